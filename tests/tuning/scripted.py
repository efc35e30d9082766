"""Benches whose times are scripted, for tests of the final comparison and the verdict."""

import random
from collections import Counter

from planted import tactic

from moetune.tuning.final_comparison import SAMPLES, FinalSamples, compare_finalists

DEFAULT, GOOD, NEXT, POOR = map(tactic, ("default", "good", "next", "poor"))


class Scripted:
    """A bench on which the default takes 10 µs and others 9, in disturbed rounds `slow(round)` times that.

    Of the tactic that is timed twice, the first time is never disturbed. `fails`: a tactic, and from which round on.
    """

    def __init__(self, slow, fails=(None, 0)):
        self.failures, self.rounds, self._slow, self._fails = {}, 0, slow, fails

    def samples(self, tactics, draws):
        start, self.rounds = self.rounds, self.rounds + len(draws)
        failing, since = self._fails
        if failing in tactics and self.rounds > since:
            self.failures[failing] = "planted failure"
        slow = [self._slow(number) for number in range(start, self.rounds)]
        series = [[(10.0 if one == tactic("default") else 9.0) * factor for factor in slow] for one in tactics]
        if len(tactics) > 1:
            series[0] = [9.0 if tactics[0] != tactic("default") else 10.0] * len(draws)
        return [None if one in self.failures else of for one, of in zip(tactics, series, strict=True)]


class Uneven:
    """Tactics by their µs on even and on odd draws, besides that uneven by `spread`, each in its own way.

    Counts the rounds of each. `fails`: a tactic, and in which call it fails.
    """

    def __init__(self, us, spread=0.0, fails=(None, 0)):
        self.us, self.spread, self.failures, self.rounds, self.calls = us, spread, {}, Counter(), 0
        self.eager, self._fails = {}, fails

    def samples(self, tactics, draws):
        self.calls += 1
        if self._fails[0] in tactics and self.calls == self._fails[1]:
            self.failures[self._fails[0]] = "planted"
        for one in dict.fromkeys(tactics):
            self.rounds[one] += len(draws)
        return [None if t in self.failures else tuple(self.once_us(t, draw) for draw in draws) for t in tactics]

    def once_us(self, one, draw):
        return self.us[one][draw % 2] * random.Random(f"{one} {draw}").gauss(1, self.spread)


UNSEEN = range(16, 80)
"""The numbers of a final comparison's draws."""


def compare(bench, default, finalists, **times):
    """The final comparison of these tactics at 8 rows, on 64 draws."""
    return compare_finalists(bench, default, finalists, UNSEEN, 8, **times)


def final_of(finalists, default_us=(10.0,) * 20, rows=8, default=DEFAULT):
    """The samples of a final comparison without noise."""
    return FinalSamples(rows, default, tuple(default_us), 0.0, finalists, tuple(range(len(default_us))))


TO_THE_END = (*UNSEEN, *UNSEEN)[: SAMPLES[1]]


TIED = {GOOD: (9.0, 10.0), NEXT: (10.0, 9.0)}


class Unsteady(Uneven):
    """In the opening `GOOD` takes 8 % less."""

    def samples(self, tactics, draws):
        taken, factor = super().samples(tactics, draws), 0.92 if self.calls < 3 else 1.0
        return [
            tuple(factor * us for us in series) if one == GOOD else series
            for one, series in zip(tactics, taken, strict=True)
        ]


class Drifting:
    """Tactics by their µs, all times a factor that drifts from round to round; counts how often each was timed.

    `hiccup`: a tactic that takes three times as long in the first two rounds. `apart`: by what factor the second of two
    series of one tactic is longer. `fails`: a tactic, and the call from which on it fails.
    """

    def __init__(self, us, *, hiccup=None, apart=1.0, fails=(None, 0)):
        self.us, self.failures, self.timed, self.calls = us, {}, Counter(), 0
        self._hiccup, self._apart, self._fails = hiccup, apart, fails
        self._chance = random.Random(0)

    def samples(self, tactics, draws):
        self.calls += 1
        if self._fails[0] in tactics and self.calls >= self._fails[1]:
            self.failures[self._fails[0]] = "planted"
        drift = [1 + 0.3 * self._chance.random() for _ in draws]
        taken, seen = [], set()
        for one in tactics:
            self.timed[one] += len(draws)
            factor = self._apart if one in seen else 1.0
            seen.add(one)
            series = [self.us[one] * factor * each * self._chance.gauss(1, 1e-3) for each in drift]
            if one == self._hiccup and self.calls == 1:
                series[:2] = [3 * once_us for once_us in series[:2]]
            taken.append(None if one in self.failures else tuple(series))
        return taken
