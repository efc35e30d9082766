"""The final of a bucket: the default and the finalists side by side, and the verdict."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from moetune.errors import NoResultError
from moetune.spec.tactic import Tactic
from moetune.stats import Ratio, median, noise_floor, paired_ratio
from moetune.store.profile import Choice, Rejection

if TYPE_CHECKING:
    from moetune.measure.bench import BenchLike
    from moetune.workload.routing import Routing

Sample = TypeVar("Sample")

STRESS_FACTORS = (2, 3, 4)
"""A finalist is also timed with the busiest expert at these times its load."""
CLIFF = 2.0
"""A finalist that is slower than this times the best of all, the default included, on a stress draw cannot win."""
STRESS_SAMPLES = 5
"""How often all are timed on each stress draw where one seems to fall off a cliff; else once."""
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
OWN_ROWS_WEIGHT = 0.5
"""How much it counts to be behind on a bucket's own rows, where others are met in it.

Tactics that are best for the one can be far behind for the other, and none be good for both.
"""


@dataclass(frozen=True, slots=True)
class Final:
    """Paired samples in µs of the default and of every finalist, and the A/A noise floor.

    Sample i of each was taken in one round, on `draws[i]`. Who left before the end has fewer: those of the first
    rounds. `noise` is that of the default; where that is far behind, of who led. `alternate`: even draws have the
    bucket's own rows, odd ones those that are met in it. `opening`: how many rounds say nothing about who is the
    fastest of those who went on, see `OPENING`.
    """

    default: Tactic
    default_us: tuple[float, ...]
    noise: float
    finalists: Mapping[Tactic, tuple[float, ...]]
    draws: tuple[int, ...]
    alternate: bool = False
    opening: int = 0

    def counted(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Of one tactic's samples, or what goes with them, those after the opening; all where it left with that."""
        return samples[self.opening :] or samples


@dataclass(frozen=True, slots=True)
class Verdict:
    """The tactic that won, its samples, its gain over the default, and who lost the win to a cliff."""

    tactic: Tactic
    samples_us: tuple[float, ...]
    gain: Ratio
    stress_us: Mapping[str, float]
    default_stress_us: Mapping[str, float]
    cliffs: Mapping[Tactic, str]


def play(
    bench: BenchLike,
    default: Tactic,
    finalists: Sequence[Tactic],
    draws: Sequence[int],
    seconds: float | None = None,
    *,
    most_s: float | None = None,
    alternate: bool = False,
) -> Final:
    """Interleaves the default, the finalists and the default again (A/A), on `draws` in turn.

    After a few opening rounds those leave that are behind; where the default does, the leader is timed twice, and for
    those who go on only what follows counts. As long as it is not settled who is the fastest, who may be it goes on.

    A round in which one tactic took two different times says nothing about the others either: it is dropped for all
    alike, as long as enough rounds remain. A finalist that fails in any round is no finalist any more.

    Args:
        bench: where they are timed.
        default: what must be beaten.
        finalists: who may beat it, the likeliest first.
        draws: numbers of the bench's draws.
        seconds: about how long it may take before it is prolonged; `most_s` by default.
        most_s: about how long in all, where the least rounds do not take longer; `SECONDS` by default.
        alternate: whether even draws have the bucket's own rows, odd ones those that are met in it.

    Raises:
        NoResultError: the default failed.
    """
    race = _Race(bench, default, finalists, draws)
    everyone = (*finalists, default)
    race.run(everyone, 1, 1)  # who is timed twice must be known
    race.run(everyone, OPENING - 1, OPENING - 1)
    players = race.staying()
    race.opening = 0 if default in players else len(race.draws)
    opening_us, round_us = race.round_us(race.series), race.round_us(players)
    most_us = 1e6 * (SECONDS if most_s is None else most_s)
    first_us = most_us if seconds is None else min(1e6 * seconds, most_us)
    least = SAMPLES[0] * (2 if alternate else 1)
    rounds = _num_rounds(round_us, first_us - OPENING * (opening_us - round_us), least)
    race.run(players, rounds - OPENING, least - OPENING)
    most = min(SAMPLES[1], int(most_us / max(round_us, 1.0)))
    while (rounds := min(len(race.draws), most - len(race.draws))) > 0 and (players := race.unsettled(alternate)):
        race.run(players, rounds, 1)
    if not race.stayed():  # all who went on have failed
        left = [tactic for tactic in race.series if tactic != default]
        return play(bench, default, left, draws, seconds, most_s=most_s, alternate=alternate)
    noise = noise_floor(*zip(*race.pairs[race.opening :], strict=True))
    default_us = race.series.pop(default)
    return Final(default, default_us, noise, race.series, tuple(race.draws), alternate, race.opening)


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

    def unsettled(self, alternate: bool) -> tuple[Tactic, ...]:
        """Who may be the fastest; nobody where at most `SETTLED` is left to be gained."""
        stayed = self.stayed()
        if len(stayed) < 2:
            return ()
        if alternate:
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


def decide(final: Final, bench: BenchLike, stress_draws: Mapping[str, int]) -> Verdict:
    """The fastest finalist that beats the default beyond noise, and neither fails nor falls off a cliff under stress.

    Where there is none it is the default. Where draws alternate between two row counts, the fastest is who is the least
    behind the best at that one at which it is further behind, the bucket's own counting `OWN_ROWS_WEIGHT`.

    Args:
        final: who played.
        bench: where finalists are timed under stress.
        stress_draws: the bench's draws on which the busiest expert has a factor of its load, by that factor.
    """
    better = [
        tactic
        for tactic, series in _ranked(final)
        if common_ratio(series, final.default_us).high < 1 - final.noise
        and median(series) < median(final.default_us)  # else its mean is better by a few disturbed rounds alone
    ]
    stress_us = _stress(bench, (*better, final.default), stress_draws, 1)
    if any(_cliff(tactic, stress_us) for tactic in better):
        stress_us = _stress(bench, (*better, final.default), stress_draws, STRESS_SAMPLES)
    cliffs: dict[Tactic, str] = {}
    for tactic in better:
        if tactic in bench.failures:
            continue
        if cliff := _cliff(tactic, stress_us):
            cliffs[tactic] = cliff
            continue
        series = final.finalists[tactic]
        gain = common_ratio(final.default_us, series)
        return Verdict(tactic, series, gain, stress_us[tactic], stress_us[final.default], cliffs)
    unchanged = paired_ratio(final.default_us, final.default_us)
    of_default = stress_us[final.default]
    return Verdict(final.default, final.default_us, unchanged, of_default, of_default, cliffs)


def choice(
    final: Final,
    verdict: Verdict,
    bench: BenchLike,
    routings: Sequence[Routing],
    *,
    rows: int,
    tried: int,
    candidates: int,
    met_rows: int | None = None,
    failed: Mapping[Tactic, str] | None = None,
) -> Choice:
    """The record of a bucket that is decided.

    Args:
        final: who played.
        verdict: who won.
        bench: knows which tactics failed on it, and which were timed without a CUDA graph.
        routings: the draws whose load is kept, of each local expert.
        rows: the bucket.
        tried: how many tactics the search timed or saw fail.
        candidates: how many there are, excluded ones too.
        met_rows: the rows that are met in it; the bucket's own by default.
        failed: tactics that failed before they came to the bench, each with the reason.
    """
    reasons = {**(failed or {}), **bench.failures, **verdict.cliffs}
    time_us = fmean(final.counted(verdict.samples_us))
    loads = [routing.load.tolist() for routing in routings]
    return Choice(
        rows=rows,
        met_rows=None if met_rows == rows else met_rows,
        tactic=verdict.tactic,
        time_us=time_us,
        default_tactic=final.default,
        default_time_us=time_us * verdict.gain.value,
        gain=verdict.gain.value,
        gain_low=verdict.gain.low,
        gain_high=verdict.gain.high,
        noise=final.noise,
        stress_us=dict(verdict.stress_us),
        default_stress_us=dict(verdict.default_stress_us),
        tried=tried,
        candidates=candidates,
        eager=bench.eager.get(verdict.tactic, ""),
        rejected=tuple(Rejection(tactic=tactic, reason=reason) for tactic, reason in reasons.items()),
        load=tuple(map(sum, zip(*loads, strict=True))),
        max_load=max(map(max, loads)),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def common_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """`paired_ratio` over the rounds that both played: the first ones."""
    rounds = min(len(numerator), len(denominator))
    return paired_ratio(numerator[:rounds], denominator[:rounds])


def _ranked(final: Final) -> list[tuple[Tactic, tuple[float, ...]]]:
    """The finalists and their samples, those that stayed to the end first, then by how far behind they are at worst."""
    kinds = [draw % 2 if final.alternate else 0 for draw in final.draws]

    def means_us(series: Sequence[float]) -> list[float]:
        counted = final.counted(list(zip(series, kinds, strict=False)))
        by_kind = ([time for time, of in counted if of == kind] for kind in sorted(set(kinds)))
        return [fmean(of_kind or series) for of_kind in by_kind]

    stayed = max(map(len, final.finalists.values()), default=0)
    best: list[float] = [
        min(column) for column in zip(*(means_us(s) for s in final.finalists.values() if len(s) == stayed), strict=True)
    ]

    def behind(series: Sequence[float]) -> float:
        columns = zip(means_us(series), best, (OWN_ROWS_WEIGHT, 1.0), strict=False)
        return max(weight * (time / least - 1) for time, least, weight in columns)

    return sorted(final.finalists.items(), key=lambda item: (-len(item[1]), behind(item[1])))


def _stress(
    bench: BenchLike, tactics: Sequence[Tactic], stress_draws: Mapping[str, int], samples: int
) -> dict[Tactic, dict[str, float]]:
    """Median times in µs of each tactic on each stress draw, by its factor; infinite where it failed."""
    draws = [draw for _ in range(samples) for draw in stress_draws.values()]
    taken = bench.samples(tactics, draws)
    return {
        tactic: {
            factor: median(series[at :: len(stress_draws)]) if series else float("inf")
            for at, factor in enumerate(stress_draws)
        }
        for tactic, series in zip(tactics, taken, strict=True)
    }


def _cliff(tactic: Tactic, stress_us: Mapping[Tactic, Mapping[str, float]]) -> str | None:
    """Where a tactic falls off, in words, or None."""
    for factor, time_us in stress_us[tactic].items():
        best_us = min(times[factor] for times in stress_us.values())
        if time_us > CLIFF * best_us:
            return (
                f"cliff: {time_us / best_us:.1f} times the best one's time with the busiest expert at {factor} "
                "times its load"
            )
    return None
