"""Times the default and the finalists of a bucket at one row count, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import TYPE_CHECKING

from moetune.errors import DefaultFailedError
from moetune.spec.tactic import Tactic
from moetune.spec.under import place
from moetune.stats import Ratio, median, noise_floor, paired_ratio

if TYPE_CHECKING:
    from moetune.measure.bench import BenchLike

SECONDS = 1.0
"""About how long the rounds of a bucket's final comparison may take, at all its row counts together."""
SAMPLES = (20, 96)
"""The least and the most paired samples of a tactic at one row count."""
TRIES = 3
"""How often rounds are taken again if too many of them were disturbed."""
DISTURBED = 1.25
"""A round is disturbed if two times of the same tactic differ by more than this factor."""
OPENING = 6
"""After this many rounds the tactics that are clearly slower are dropped, because they would take much of the time.

If the default is dropped, these rounds are not counted for the remaining tactics. Beside a default that is much slower
and leaves the GPU half idle, an H200 jumps between its power limit and the clock above it: two tactics of 10 ms differ
by 5.3 % (1 σ) from round to round, and by 1.1 % without it.
"""
DEFAULT_DROPPED, FINALIST_DROPPED = 1.5, 1.1
"""The default is dropped if it takes more than the first times the leader's time, a finalist more than the second."""
SETTLED = 0.005
"""Sampling ends when, at 95 %, no tactic is faster than the leader by more than this."""


@dataclass(frozen=True, slots=True)
class FinalSamples:
    """The paired samples of a final comparison at one row count, in µs.

    Attributes:
        rows: the row count.
        default: the tactic to beat: what the engine would run with this many rows.
        default_us: its samples. Sample i of every tactic was taken in one round, on `draws[i]`.
        noise: the A/A noise of the default, or of the leader if the default was dropped.
        finalists: the finalists' samples. A dropped tactic has fewer samples, those of the first rounds.
        draws: the draw of each round.
        opening: how many rounds are not counted for the remaining tactics, see `OPENING`.
        distribution: the distribution of the draws; empty if the regime has only one.
    """

    rows: int
    default: Tactic
    default_us: tuple[float, ...]
    noise: float
    finalists: Mapping[Tactic, tuple[float, ...]]
    draws: tuple[int, ...]
    opening: int = 0
    distribution: str = ""

    @property
    def place(self) -> str:
        """Returns where the samples were taken: `8 rows`, or `8 rows under zipf:1`."""
        return place(self.rows, self.distribution)

    @property
    def all_us(self) -> dict[Tactic, tuple[float, ...]]:
        """The samples of the default and the finalists."""
        return {self.default: self.default_us, **self.finalists}

    @property
    def remaining(self) -> tuple[Tactic, ...]:
        """The tactics that were timed in every round."""
        return tuple(tactic for tactic, series in self.all_us.items() if len(series) == len(self.draws))

    def counted(self, samples: Sequence[float]) -> Sequence[float]:
        """Returns a tactic's samples after the opening, or all if it was dropped after that."""
        return samples[self.opening :] or samples

    def gain(self, tactic: Tactic) -> Ratio:
        """Returns the default's time over that of `tactic`, in the rounds in which both were timed."""
        return _paired_ratio(*_common(self.default_us, self.all_us[tactic]))

    def ratio(self, tactic: Tactic, other: Tactic) -> Ratio:
        """Returns the time of `tactic` over that of `other`, in the counted rounds in which both were timed."""
        return _paired_ratio(*self._counted_in_both(tactic, other))

    def mean_ratio(self, tactic: Tactic, other: Tactic) -> float:
        """Returns `ratio` without its bounds, which take milliseconds."""
        mine, theirs = self._counted_in_both(tactic, other)
        return sum(mine) / sum(theirs)

    def slowdown(self, tactic: Tactic) -> float:
        """Returns the time of `tactic` over that of the fastest tactic."""
        series = self.all_us
        fastest = min(self.remaining, key=lambda one: sum(self.counted(series[one])))
        return self.mean_ratio(tactic, fastest)

    def regret_high(self, tactic: Tactic) -> float:
        """Returns by how much any other tactic may be faster than `tactic`, at 95 %, relative; at least 0."""
        return max([0.0, *(self.ratio(tactic, other).high - 1 for other in self.remaining if other != tactic)])

    def _counted_in_both(self, tactic: Tactic, other: Tactic) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mine, theirs = self.all_us[tactic], self.all_us[other]
        if min(len(mine), len(theirs)) == len(self.draws):
            return mine[self.opening :], theirs[self.opening :]
        return _common(mine, theirs)


def _common(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the samples of the rounds in which both were timed, the first ones."""
    rounds = min(len(one), len(other))
    return one[:rounds], other[:rounds]


@lru_cache(maxsize=256)
def _paired_ratio(numerator: tuple[float, ...], denominator: tuple[float, ...]) -> Ratio:
    """Returns `paired_ratio`. It takes milliseconds, and a bucket's verdict asks for the same ones several times."""
    return paired_ratio(numerator, denominator)


def compare_finalists(
    bench: BenchLike,
    default: Tactic,
    finalists: Sequence[Tactic],
    draws: Sequence[int],
    rows: int,
    *,
    seconds: float | None = None,
    most_s: float | None = None,
) -> FinalSamples:
    """Times the default and the finalists in interleaved rounds, on draws of one row count in turn.

    One tactic is timed twice in each round (A/A): the default, or the leader if the default is much slower. After
    `OPENING` rounds the clearly slower tactics are dropped. Then sampling continues until one tactic is best within
    `SETTLED`, or the time ends.

    A round is dropped for all tactics if the tactic that is timed twice took two different times in it, as long as
    enough rounds remain. A finalist that fails in any round is no finalist any more.

    Args:
        bench: where the tactics are timed.
        default: the tactic to beat.
        finalists: the others, the most promising first.
        draws: the numbers of the bench's draws to use.
        rows: the row count of these draws.
        seconds: about how long the first rounds may take, before sampling is prolonged; `most_s` by default.
        most_s: about how long all may take, unless the least number of rounds takes longer; `SECONDS` by default.

    Raises:
        DefaultFailedError: the default failed.
    """
    taken = _Samples(bench, default, finalists, draws)
    everyone = (*finalists, default)
    taken.add(everyone, 1, 1)  # the first round decides which tactic is timed twice
    taken.add(everyone, OPENING - 1, OPENING - 1)
    remaining = taken.not_clearly_slower()
    taken.opening = 0 if default in remaining else len(taken.draws)
    opening_us, round_us = taken.round_us(taken.series), taken.round_us(remaining)
    most_us = 1e6 * (SECONDS if most_s is None else most_s)
    first_us = most_us if seconds is None else min(1e6 * seconds, most_us)
    rounds = _num_rounds(round_us, first_us - OPENING * (opening_us - round_us))
    taken.add(remaining, rounds - OPENING, SAMPLES[0] - OPENING)
    most = min(SAMPLES[1], int(most_us / max(round_us, 1.0)))
    while (further := min(len(taken.draws), most - len(taken.draws))) > 0 and (remaining := taken.unsettled()):
        taken.add(remaining, further, 1)
    if not taken.complete():  # all remaining tactics have failed
        dropped = [tactic for tactic in taken.series if tactic != default]
        return compare_finalists(bench, default, dropped, draws, rows, seconds=seconds, most_s=most_s)
    noise = noise_floor(*zip(*taken.pairs[taken.opening :], strict=True))
    default_us = taken.series.pop(default)
    return FinalSamples(rows, default, default_us, noise, taken.series, tuple(taken.draws), taken.opening)


def compare_right_ones(
    bench: BenchLike,
    default: Tactic,
    finalists: Sequence[Tactic],
    draws: Sequence[int],
    rows: int,
    *,
    seconds: float | None = None,
    most_s: float | None = None,
) -> FinalSamples:
    """Compares finalists as `compare_finalists` does, then checks the outputs of the remaining ones.

    Outputs are checked after the timing, on a draw with an odd number, because a search checks before it and on draw 0.
    If a tactic is wrong, the others are compared again, because they may have been dropped for it.

    Raises:
        DefaultFailedError: the default failed or computes a wrong result.
    """
    checked = draws[-1] if draws[-1] % 2 or len(draws) == 1 else draws[-2]
    while True:
        samples = compare_finalists(bench, default, finalists, draws, rows, seconds=seconds, most_s=most_s)
        right = [bench.check(tactic, checked) for tactic in dict.fromkeys((default, *samples.remaining))]
        if default in bench.failures:
            raise DefaultFailedError(f"The default tactic {default} failed at {rows} rows: {bench.failures[default]}.")
        if all(right):
            return samples
        finalists = [tactic for tactic in finalists if tactic not in bench.failures]


class _Samples:
    """The samples of a final comparison that is being taken.

    Attributes:
        series: samples in µs of all tactics that have not failed.
        draws: the draw of each round.
        pairs: samples in µs of the tactic that was timed twice in a round (A/A).
        opening: how many rounds are not counted for the remaining tactics; 0 if the default is one of them.
    """

    def __init__(self, bench: BenchLike, default: Tactic, finalists: Sequence[Tactic], draws: Sequence[int]) -> None:
        self.series: dict[Tactic, tuple[float, ...]] = dict.fromkeys((*finalists, default), ())
        self.draws: list[int] = []
        self.pairs: list[tuple[float, float]] = []
        self.opening = 0
        self._bench, self._default, self._turns = bench, default, cycle(draws)

    def add(self, tactics: Sequence[Tactic], rounds: int, least: int) -> None:
        """Takes rounds of `tactics`, one of them timed twice in each. If that one fails, the others are timed again.

        Args:
            tactics: the tactics; those that have failed are left out.
            rounds: how many rounds.
            least: how many of them must be undisturbed; if fewer are, all count.

        Raises:
            DefaultFailedError: the default failed.
        """
        while tactics := [tactic for tactic in tactics if tactic in self.series]:
            twice = self._timed_twice(tactics)
            once = [tactic for tactic in tactics if tactic != twice]
            (*taken, again), drawn = _take_rounds(self._bench, (twice, *once, twice), self._turns, rounds, least)
            failures = self._bench.failures
            if self._default in failures:
                reason = failures[self._default]
                raise DefaultFailedError(
                    f"The default tactic {self._default} failed in the final comparison: {reason}."
                )
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

    def not_clearly_slower(self) -> tuple[Tactic, ...]:
        """Returns the leader, and the tactics that are not clearly slower or may only seem so by chance."""
        medians = {tactic: median(series) for tactic, series in self.series.items()}
        leader, *others = sorted(medians, key=lambda tactic: medians[tactic])

        def is_slower(tactic: Tactic) -> bool:
            limit = DEFAULT_DROPPED if tactic == self._default else FINALIST_DROPPED
            seems_slower = medians[tactic] > limit * medians[leader]
            return seems_slower and paired_ratio(self.series[tactic], self.series[leader]).low > 1

        return (leader, *(tactic for tactic in others if not is_slower(tactic)))

    def complete(self) -> dict[Tactic, tuple[float, ...]]:
        """Returns the samples in µs of the tactics that were timed in every round."""
        return {tactic: series for tactic, series in self.series.items() if len(series) == len(self.draws)}

    def unsettled(self) -> tuple[Tactic, ...]:
        """Returns the tactics that may still be the fastest; none if at most `SETTLED` can be gained."""
        complete = self.complete()
        if len(complete) < 2:
            return ()
        counted = {tactic: series[self.opening :] for tactic, series in complete.items()}
        leader = min(counted, key=lambda tactic: sum(counted[tactic]))
        low = {tactic: paired_ratio(series, counted[leader]).low for tactic, series in counted.items()}
        if all(bound >= 1 - SETTLED for bound in low.values()):
            return ()
        return tuple(tactic for tactic in complete if low[tactic] <= 1)

    def round_us(self, tactics: Collection[Tactic]) -> float:
        """Returns about how long a round of these takes."""
        return sum(median(self.series[tactic]) for tactic in (*tactics, self._timed_twice(tactics)))

    def _timed_twice(self, tactics: Collection[Tactic]) -> Tactic:
        """Returns the default, or the leader if the default is much slower; before the first round any tactic."""
        medians = {tactic: median(self.series[tactic]) for tactic in tactics if self.series[tactic]}
        leader = min(medians or tactics, key=lambda tactic: medians.get(tactic, 0.0))
        is_near = self._default in medians and medians[self._default] <= DEFAULT_DROPPED * medians[leader]
        return self._default if is_near else leader


def _num_rounds(round_us: float, budget_us: float) -> int:
    """Returns how many rounds are taken before sampling is prolonged."""
    return min(SAMPLES[1], max(SAMPLES[0], int(budget_us / max(round_us, 1.0))))


def _take_rounds(
    bench: BenchLike, tactics: Sequence[Tactic], turns: Iterator[int], rounds: int, least: int
) -> tuple[list[list[float]], list[int]]:
    """Returns paired samples in µs by position, and their draws, of the undisturbed rounds.

    The first tactic and the last are the same one; a round is undisturbed if its two times agree. If `TRIES` times
    `rounds` have fewer than `least` undisturbed ones, all are returned. A tactic that fails has no samples.
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
