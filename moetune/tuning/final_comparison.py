"""The final of a bucket: the default and the finalists are timed side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, TypeVar

from moetune.errors import NoResultError
from moetune.spec.tactic import Tactic
from moetune.stats import median, noise_floor, paired_ratio

if TYPE_CHECKING:
    from moetune.measure.bench import BenchLike
    from moetune.workload.draws import Draw

Sample = TypeVar("Sample")

SECONDS = 1.0
"""About how long the interleaved rounds of one final may take."""
SAMPLES = (20, 96)
"""The least and the most paired samples of a final; the least of each row count, where there are two."""
TRIES = 3
"""How often a final is prolonged when too many of its rounds were disturbed."""
DISTURBED = 1.25
"""A round is disturbed where two times of the same tactic differ by more than this factor."""
OPENING = 6
"""After so many rounds those leave that are behind: they would take much of the time to say what a few rounds say.

If the default does, these rounds are not counted for the others. Beside one that is far behind and keeps the GPU half
idle, an H200 jumps between its power limit and the clock above: two tactics of 10 ms differ by 5.3 % (1 σ) from round
to round, and by 1.1 % thereafter.
"""
FAR, BEHIND = 1.5, 1.1
"""The default is behind if it is slower than the first times the best one, a finalist than the second times it."""
SETTLED = 0.005
"""A final is settled when, at 95 %, nobody is faster than the leader by more than this. Until then it is prolonged.

Where two row counts are played it never is, as the mean of all rounds says little there.
"""


@dataclass(frozen=True, slots=True)
class Final:
    """Paired samples in µs of the default and of every finalist, and the A/A noise floor.

    Sample i of each was taken in one round, on `draws[i]`. Who left before the end has fewer: those of the first
    rounds. `noise` is that of the default; where that is far behind, of who led. `rows`: the rows
    of each round's draw. `opening`: how many rounds say nothing about who is the
    fastest of those who went on, see `OPENING`.
    """

    default: Tactic
    default_us: tuple[float, ...]
    noise: float
    finalists: Mapping[Tactic, tuple[float, ...]]
    draws: tuple[int, ...]
    rows: tuple[int, ...]
    opening: int = 0

    def counted(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Of one tactic's samples, or what goes with them, those after the opening; all where it left with that."""
        return samples[self.opening :] or samples


def play(
    bench: BenchLike,
    default: Tactic,
    finalists: Sequence[Tactic],
    draws: Sequence[Draw],
    seconds: float | None = None,
    *,
    most_s: float | None = None,
    pooled: bool = False,
) -> Final:
    """Interleaves the default, the finalists and the default again (A/A), on the final's draws in turn.

    After a few opening rounds those leave that are behind; where the default does, the leader is timed twice, and for
    those who go on only what follows counts. As long as it is not settled who is the fastest, who may be it goes on.

    A round in which one tactic took two different times says nothing about the others either: it is dropped for all
    alike, as long as enough rounds remain. A finalist that fails in any round is no finalist any more.

    Args:
        bench: where they are timed.
        default: what must be beaten.
        finalists: who may beat it, the likeliest first.
        draws: the bench's draws; those of kind `final` are used.
        seconds: about how long it may take before it is prolonged; `most_s` by default.
        most_s: about how long in all, where the least rounds do not take longer; `SECONDS` by default.
        pooled: whether the mean over all rounds decides, even if the draws have two row counts.

    Raises:
        NoResultError: the default failed.
    """
    numbers = [number for number, draw in enumerate(draws) if draw.kind == "final"]
    several = not pooled and len({draws[number].rows for number in numbers}) > 1
    race = _Race(bench, default, finalists, numbers)
    everyone = (*finalists, default)
    race.run(everyone, 1, 1)  # who is timed twice must be known
    race.run(everyone, OPENING - 1, OPENING - 1)
    players = race.staying()
    race.opening = 0 if default in players else len(race.draws)
    opening_us, round_us = race.round_us(race.series), race.round_us(players)
    most_us = 1e6 * (SECONDS if most_s is None else most_s)
    first_us = most_us if seconds is None else min(1e6 * seconds, most_us)
    least = SAMPLES[0] * (2 if several else 1)
    rounds = _num_rounds(round_us, first_us - OPENING * (opening_us - round_us), least)
    race.run(players, rounds - OPENING, least - OPENING)
    most = min(SAMPLES[1], int(most_us / max(round_us, 1.0)))
    while (rounds := min(len(race.draws), most - len(race.draws))) > 0 and (players := race.unsettled(several)):
        race.run(players, rounds, 1)
    if not race.stayed():  # all who went on have failed
        left = [tactic for tactic in race.series if tactic != default]
        return play(bench, default, left, draws, seconds, most_s=most_s, pooled=pooled)
    noise = noise_floor(*zip(*race.pairs[race.opening :], strict=True))
    default_us = race.series.pop(default)
    rows = tuple(draws[number].rows for number in race.draws)
    return Final(default, default_us, noise, race.series, tuple(race.draws), rows, race.opening)


class _Race:
    """A final that is being played.

    Attributes:
        series: samples in µs of all who have not failed.
        draws: of the rounds.
        pairs: samples in µs of who was timed twice in a round (A/A).
        opening: how many rounds are not counted for those who went on; 0 where the default is one of them.
    """

    def __init__(self, bench: BenchLike, default: Tactic, finalists: Sequence[Tactic], draws: Sequence[int]) -> None:
        self.series: dict[Tactic, tuple[float, ...]] = dict.fromkeys((*finalists, default), ())
        self.draws: list[int] = []
        self.pairs: list[tuple[float, float]] = []
        self.opening = 0
        self._bench, self._default, self._turns = bench, default, cycle(draws)

    def run(self, players: Sequence[Tactic], rounds: int, least: int) -> None:
        """That many rounds of `players`, one of them twice in each; should that one fail, again with the others.

        Args:
            players: who is timed.
            rounds: how many.
            least: how many must be undisturbed, or all count.

        Raises:
            NoResultError: the default failed.
        """
        while players := [player for player in players if player in self.series]:
            twice = self._twice(players)
            once = [player for player in players if player != twice]
            (*taken, again), drawn = _rounds(self._bench, (twice, *once, twice), self._turns, rounds, least)
            failures = self._bench.failures
            if self._default in failures:
                reason = failures[self._default]
                raise NoResultError(f"The default tactic {self._default} failed in the final: {reason}.")
            further = dict(zip((twice, *once), taken, strict=True))
            self.series = {
                tactic: (*series, *further.get(tactic, ()))
                for tactic, series in self.series.items()
                if tactic not in failures
            }
            self.draws += drawn
            self.pairs += zip(taken[0], again, strict=True)
            if twice in self.series:
                return

    def staying(self) -> tuple[Tactic, ...]:
        """Who goes on after the opening: who is not behind, or by chance may only seem so."""
        medians = {tactic: median(series) for tactic, series in self.series.items()}
        leader, *others = sorted(medians, key=lambda tactic: medians[tactic])

        def is_behind(tactic: Tactic) -> bool:
            limit = FAR if tactic == self._default else BEHIND
            seems_so = medians[tactic] > limit * medians[leader]
            return seems_so and paired_ratio(self.series[tactic], self.series[leader]).low > 1

        return (leader, *(tactic for tactic in others if not is_behind(tactic)))

    def stayed(self) -> dict[Tactic, tuple[float, ...]]:
        """The samples in µs of who has played every round."""
        return {tactic: series for tactic, series in self.series.items() if len(series) == len(self.draws)}

    def unsettled(self, several: bool) -> tuple[Tactic, ...]:
        """Who may be the fastest; nobody where at most `SETTLED` is left to be gained."""
        stayed = self.stayed()
        if len(stayed) < 2:
            return ()
        if several:
            return tuple(stayed)
        counted = {tactic: series[self.opening :] for tactic, series in stayed.items()}
        leader = min(counted, key=lambda tactic: sum(counted[tactic]))
        low = {tactic: paired_ratio(series, counted[leader]).low for tactic, series in counted.items()}
        if all(bound >= 1 - SETTLED for bound in low.values()):
            return ()
        return tuple(tactic for tactic in stayed if low[tactic] <= 1)

    def round_us(self, players: Collection[Tactic]) -> float:
        """About how long a round of these takes."""
        return sum(median(self.series[tactic]) for tactic in (*players, self._twice(players)))

    def _twice(self, players: Collection[Tactic]) -> Tactic:
        """Who is timed twice in a round: the default, as it is to be beaten; where that is far behind, the leader.

        Before the first round, which tells it, the first.
        """
        medians = {tactic: median(self.series[tactic]) for tactic in players if self.series[tactic]}
        leader = min(medians or players, key=lambda tactic: medians.get(tactic, 0.0))
        is_near = self._default in medians and medians[self._default] <= FAR * medians[leader]
        return self._default if is_near else leader


def _num_rounds(round_us: float, budget_us: float, least: int) -> int:
    """How many rounds a final has before it is prolonged."""
    return min(SAMPLES[1], max(least, int(budget_us / max(round_us, 1.0))))


def _rounds(
    bench: BenchLike, tactics: Sequence[Tactic], turns: Iterator[int], rounds: int, least: int
) -> tuple[list[list[float]], list[int]]:
    """Paired samples in µs by position, and their draws: of the rounds in which the first tactic and the last agree.

    Those are the same tactic. Of all rounds, where there are not `least` such after `TRIES`. Of a tactic that fails
    there are none.
    """
    series: list[list[float]] = [[] for _ in tactics]
    draws: list[int] = []
    for _ in range(TRIES):
        draws += islice(turns, rounds)
        for times, taken in zip(series, bench.samples(tactics, draws[-rounds:]), strict=True):
            times.extend(taken or ())
        series = [[] if tactic in bench.failures else times for tactic, times in zip(tactics, series, strict=True)]
        if tactics[0] in bench.failures:
            break
        pairs = enumerate(zip(series[0], series[-1], strict=True))
        quiet = [number for number, pair in pairs if max(pair) <= DISTURBED * min(pair)]
        if len(quiet) >= least:
            kept = [[times[number] for number in quiet] if times else [] for times in series]
            return kept, [draws[number] for number in quiet]
    return series, draws
