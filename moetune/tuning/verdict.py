"""What the samples of a final say: the tactic that wins, why others cannot, and the record of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean
from typing import TYPE_CHECKING

from moetune.spec.tactic import Tactic
from moetune.stats import Ratio, median, paired_ratio
from moetune.store.profile import Choice, Rejection
from moetune.tuning.final_comparison import Final

if TYPE_CHECKING:
    from moetune.measure.bench import BenchLike
    from moetune.workload.draws import Draw
    from moetune.workload.routing import Routing

CLIFF = 2.0
"""A finalist that is slower than this times the best of all, the default included, on a stress draw cannot win."""
STRESS_SAMPLES = 5
"""How often all are timed on each stress draw where one seems to fall off a cliff; else once."""
OWN_ROWS_WEIGHT = 0.5
"""How much it counts to be behind on a bucket's own rows, where others are met in it.

Tactics that are best for the one can be far behind for the other, and none be good for both.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The tactic that won, its samples, its gain over the default, and who lost the win to a cliff."""

    tactic: Tactic
    samples_us: tuple[float, ...]
    gain: Ratio
    stress_us: Mapping[str, float]
    default_stress_us: Mapping[str, float]
    cliffs: Mapping[Tactic, str]


def decide(final: Final, bench: BenchLike, draws: Sequence[Draw], rows: int) -> Verdict:
    """The fastest finalist that beats the default beyond noise, and neither fails nor falls off a cliff under stress.

    Where there is none it is the default. Where draws alternate between two row counts, the fastest is who is the least
    behind the best at that one at which it is further behind, the bucket's own counting `OWN_ROWS_WEIGHT`.

    Args:
        final: who played.
        bench: where finalists are timed under stress.
        draws: the bench's draws; finalists are timed on those of kind `stress`.
        rows: the bucket.
    """
    stress_draws = {str(draw.stress_factor): at for at, draw in enumerate(draws) if draw.kind == "stress"}
    better = [
        tactic
        for tactic, series in _ranked(final, rows)
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
    typical_rows: int | None = None,
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
        typical_rows: the bucket's typical rows; its own by default.
        failed: tactics that failed before they came to the bench, each with the reason.
    """
    reasons = {**(failed or {}), **bench.failures, **verdict.cliffs}
    time_us = fmean(final.counted(verdict.samples_us))
    loads = [routing.load.tolist() for routing in routings]
    return Choice(
        rows=rows,
        met_rows=None if typical_rows == rows else typical_rows,
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


def _ranked(final: Final, rows: int) -> list[tuple[Tactic, tuple[float, ...]]]:
    """Returns the finalists and their samples: first those that stayed to the end, then by their worst slowdown."""
    row_counts = sorted(set(final.rows))
    weights = [OWN_ROWS_WEIGHT if count == rows else 1.0 for count in row_counts]

    def means_us(series: Sequence[float]) -> list[float]:
        counted = final.counted(list(zip(series, final.rows, strict=False)))
        by_count = ([time for time, of in counted if of == count] for count in row_counts)
        return [fmean(of_count or series) for of_count in by_count]

    stayed = max(map(len, final.finalists.values()), default=0)
    best: list[float] = [
        min(column) for column in zip(*(means_us(s) for s in final.finalists.values() if len(s) == stayed), strict=True)
    ]

    def slowdown(series: Sequence[float]) -> float:
        columns = zip(means_us(series), best, weights, strict=True)
        return max(weight * (time / least - 1) for time, least, weight in columns)

    return sorted(final.finalists.items(), key=lambda item: (-len(item[1]), slowdown(item[1])))


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
