"""Decides which tactic wins a bucket, from the samples of its final comparisons, and writes the record of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import repeat
from statistics import fmean
from typing import TYPE_CHECKING

from moetune.spec.tactic import Tactic
from moetune.stats import Ratio, median
from moetune.store.profile import Choice, ComparedRows, Rejection
from moetune.tuning.final_comparison import SETTLED, FinalSamples
from moetune.tuning.objective import SINGLE, Objective

if TYPE_CHECKING:
    from moetune.measure.bench import BenchLike
    from moetune.workload.draws import Draw
    from moetune.workload.routing import Routing

CLIFF = 2.0
"""A finalist that takes more than this times the best tactic's time on a stress draw cannot win."""
STRESS_SAMPLES = 5
"""How often all are timed on each stress draw if one seems to have a cliff; else once."""
UNLIKELY_WEIGHT = 0.5
"""Weight of the slowdown at a bucket's own row count if no whole number of tokens produces it."""

NOISY = 0.1
"""A larger A/A noise at any of a bucket's row counts decides nothing, so the default stays."""

StressTimes = Mapping[Tactic, Mapping[str, float]]
"""Each tactic's time in µs by the factor on the busiest expert's load; infinite if the tactic failed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The tactic that serves a bucket, and how it compares.

    Attributes:
        tactic: the winner, or the default.
        gains: its gain over the default, in each comparison.
        regret_high: by how much the fastest finalist may be faster at some row count, at 95 %, relative.
        equally_fast: other tactics that could serve the bucket just as well.
        rejected: finalists that could not win, with the reason: they are faster than the default at one row count and
            slower at another, or the comparison was too noisy.
    """

    tactic: Tactic
    gains: tuple[Ratio, ...]
    regret_high: float
    equally_fast: tuple[Tactic, ...]
    rejected: Mapping[Tactic, str]


def decide(
    comparisons: Sequence[FinalSamples],
    default: Tactic,
    weights: Sequence[float] | None = None,
    barred: Mapping[Tactic, str] = {},
    objective: Objective = SINGLE,
) -> Verdict:
    """Returns the verdict on a bucket.

    A finalist is eligible if it is faster than the default beyond noise at one of the row counts, and slower beyond
    noise at none. The eligible one with the smallest worst-case slowdown against the fastest tactic wins; of those that
    are within `SETTLED` of that, the one with the smallest mean slowdown. The default wins if no finalist is eligible.

    Under several distributions there is a comparison for each of them at each of its row counts. The worst-case
    slowdowns of the distributions become one number by the objective. A finalist that is slower than the default under
    any distribution is not eligible.

    An engine's default may be another tactic at each row count. Then the bucket's own default can be slower than those;
    if it is, and no finalist is eligible, the tactic that is the least slow against them wins.

    If the A/A noise at any row count is beyond `NOISY`, the default wins.

    Args:
        comparisons: the samples at each row count; the finalists of each are among those of the first.
        default: the default tactic at the bucket's own rows.
        weights: the weight of the slowdown in each comparison; 1 by default.
        barred: finalists that cannot win all the same, with the reasons.
        objective: what is minimized over the distributions of the comparisons.
    """
    shares = objective.shares([samples.distribution for samples in comparisons])
    weights = weights or (1.0,) * len(comparisons)
    tactics = _in_all(comparisons, default)
    gains = {tactic: tuple(samples.gain(tactic) for samples in comparisons) for tactic in tactics}
    if (noisiest := max(comparisons, key=lambda samples: samples.noise)).noise > NOISY:
        return _undecided(comparisons, default, gains, noisiest)
    losses = {
        tactic: reason
        for tactic in tactics
        if tactic != default and (reason := barred.get(tactic) or _any_loss(comparisons, tactic))
    }
    safe = [tactic for tactic in tactics if tactic not in losses]
    faster = [
        tactic
        for tactic in tactics
        if tactic != default and any(map(_is_faster, comparisons, repeat(tactic), gains[tactic]))
    ]
    better = [tactic for tactic in faster if tactic in safe and mean_gain(gains[tactic], shares).value > 1]
    if better:
        eligible = better
    elif _any_loss(comparisons, default):
        eligible = [tactic for tactic in safe if tactic != default] or [_least_slow(gains)]
    else:
        eligible = [default]
    slowdowns = {tactic: [samples.slowdown(tactic) for samples in comparisons] for tactic in tactics}

    def worst(tactic: Tactic) -> float:
        return objective.worst_rows(
            (samples.distribution, weight * (slow - 1))
            for samples, weight, slow in zip(comparisons, weights, slowdowns[tactic], strict=True)
        )

    def mean(tactic: Tactic) -> float:
        return sum(share * slow for share, slow in zip(shares or repeat(1.0), slowdowns[tactic], strict=False))

    least = min(map(worst, eligible))
    tied = [tactic for tactic in eligible if worst(tactic) <= least + SETTLED]
    winner = min(tied, key=mean)
    return Verdict(
        winner,
        gains[winner],
        max(samples.regret_high(winner) for samples in comparisons),
        tuple(tactic for tactic in safe if tactic != winner and _is_alike(comparisons, tactic, winner)),
        {tactic: losses[tactic] for tactic in faster if tactic in losses},
    )


def _undecided(
    comparisons: Sequence[FinalSamples],
    default: Tactic,
    gains: Mapping[Tactic, tuple[Ratio, ...]],
    noisiest: FinalSamples,
) -> Verdict:
    """Returns the verdict on a bucket that is too noisy to decide. It rejects all finalists."""
    noise = f"{100 * noisiest.noise:.1f} % at {noisiest.place}, allowed {100 * NOISY:g} %"
    finalists = [tactic for tactic in gains if tactic != default]
    return Verdict(
        default,
        gains[default],
        max(samples.regret_high(default) for samples in comparisons),
        (),
        dict.fromkeys(finalists, f"not decided: A/A noise of {noise}"),
    )


def stress_times(
    bench: BenchLike,
    finalists: Sequence[Tactic],
    default: Tactic,
    draws: Sequence[Draw],
    usual_us: Mapping[Tactic, float],
) -> StressTimes:
    """Times finalists and default on the draws of kind `stress`, several times if a finalist seems to have a cliff.

    Args:
        bench: where they are timed, on `draws` by their positions.
        finalists: the finalists.
        default: the default tactic.
        draws: the bench's draws.
        usual_us: see `cliffs`.
    """
    tactics = tuple(dict.fromkeys((*finalists, default)))
    numbers = {str(draw.stress_factor): number for number, draw in enumerate(draws) if draw.kind == "stress"}
    times = _stress_times(bench, tactics, numbers, 1)
    return _stress_times(bench, tactics, numbers, STRESS_SAMPLES) if cliffs(times, default, usual_us) else times


def cliffs(stress_us: StressTimes, default: Tactic, usual_us: Mapping[Tactic, float]) -> dict[Tactic, str]:
    """Returns the finalists that take more than `CLIFF` times the best time on a stress draw, with the reason.

    A finalist that is slower than the best without stress too has no cliff unless stress makes the ratio `CLIFF` times
    larger.

    Args:
        stress_us: the times under stress.
        default: the default tactic; it is not among those returned.
        usual_us: the mean times in µs without stress; a tactic that is missing counts as fast as any.
    """
    found: dict[Tactic, str] = {}
    for tactic, times in stress_us.items():
        for factor, time_us in times.items():
            best = min(stress_us, key=lambda other: stress_us[other][factor])
            best_us = stress_us[best][factor]
            usual = max(1.0, usual_us.get(tactic, 0.0) / usual_us.get(best, math.inf))
            if tactic != default and CLIFF * usual * best_us < time_us < math.inf:
                found.setdefault(
                    tactic,
                    f"cliff: {time_us / best_us:.1f} times the best one's time with the busiest expert at {factor} "
                    "times its load",
                )
    return found


def choice(
    comparisons: Sequence[FinalSamples],
    verdict: Verdict,
    bench: BenchLike,
    routings: Sequence[Routing],
    *,
    rows: int,
    default: Tactic,
    default_source: str = "",
    tried: int,
    candidates: int,
    stress_us: StressTimes | None = None,
    rejected: Mapping[Tactic, str] | None = None,
    objective: Objective = SINGLE,
) -> Choice:
    """Returns the record of a bucket that is decided.

    Args:
        comparisons: the samples at each row count.
        verdict: the decision on them.
        bench: knows which tactics failed on it, and which were timed without a CUDA graph.
        routings: the routings whose load is recorded, of each local expert.
        rows: the bucket.
        default: the default tactic at the bucket's own rows.
        default_source: where it is from.
        tried: how many tactics the search timed or saw fail.
        candidates: how many there are, excluded ones too.
        stress_us: the times on the stress draws.
        rejected: tactics that could not win, each with the reason.
        objective: the objective of the verdict.
    """
    by_rows = sorted(
        (_compared(samples, verdict.tactic, gain) for samples, gain in zip(comparisons, verdict.gains, strict=True)),
        key=lambda compared: compared.rows,
    )
    own = min(by_rows, key=lambda compared: abs(compared.rows - rows))
    gain = mean_gain(verdict.gains, objective.shares([samples.distribution for samples in comparisons]))
    reasons = {**bench.failures, **(rejected or {}), **verdict.rejected}
    stress_us = stress_us or {}
    loads = [routing.load.tolist() for routing in routings]
    return Choice(
        rows=rows,
        tactic=verdict.tactic,
        time_us=own.time_us,
        default_tactic=default,
        default_source=default_source,
        default_time_us=own.time_us * own.gain,
        gain=gain.value,
        gain_low=gain.low,
        gain_high=gain.high,
        noise=max(samples.noise for samples in comparisons),
        by_rows=tuple(by_rows),
        regret_high=verdict.regret_high,
        equally_fast=verdict.equally_fast,
        stress_us=dict(stress_us.get(verdict.tactic, {})),
        default_stress_us=dict(stress_us.get(default, {})),
        tried=tried,
        candidates=candidates,
        eager=bench.eager.get(verdict.tactic, ""),
        rejected=tuple(Rejection(tactic=tactic, reason=reason) for tactic, reason in reasons.items()),
        load=tuple(map(sum, zip(*loads, strict=True))),
        max_load=max(map(max, loads)),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def mean_gain(gains: Sequence[Ratio], shares: Sequence[float] | None = None) -> Ratio:
    """Returns the geometric mean of independent ratios, with its 95 % bounds.

    The logarithms' half-widths are added in quadrature (propagation of independent errors).

    Args:
        gains: the ratios.
        shares: the weight of each, which add up to 1; equal ones by default.
    """
    count = len(gains)
    weights = [1.0] * count if shares is None else [count * share for share in shares]
    weighted = list(zip(weights, gains, strict=True))
    mean = fmean(weight * math.log(gain.value) for weight, gain in weighted)
    below = math.hypot(*(weight * math.log(gain.value / gain.low) for weight, gain in weighted)) / count
    above = math.hypot(*(weight * math.log(gain.high / gain.value) for weight, gain in weighted)) / count
    return Ratio(math.exp(mean), math.exp(mean - below), math.exp(mean + above))


def _in_all(comparisons: Sequence[FinalSamples], default: Tactic) -> list[Tactic]:
    """Returns the tactics with samples in every comparison, the default first."""
    common = [tactic for tactic in comparisons[-1].all_us if all(tactic in samples.all_us for samples in comparisons)]
    return [default, *(tactic for tactic in common if tactic != default)]


def _is_faster(samples: FinalSamples, tactic: Tactic, gain: Ratio) -> bool:
    """Returns whether a tactic is faster than the default beyond noise."""
    # the medians too, else a few disturbed rounds of the default could make the mean
    return gain.low > 1 / (1 - samples.noise) and median(samples.all_us[tactic]) < median(samples.default_us)


def loss(samples: FinalSamples, tactic: Tactic) -> str:
    """Returns how much slower than the default a tactic is, if it is slower beyond noise; else an empty string."""
    gain = samples.gain(tactic)
    if gain.high < 1 and gain.value * (1 + samples.noise) < 1:
        return f"slower than the default by {100 / gain.value - 100:.1f} % at {samples.place}"
    return ""


def _any_loss(comparisons: Sequence[FinalSamples], tactic: Tactic) -> str:
    return next(filter(None, (loss(samples, tactic) for samples in comparisons)), "")


def _least_slow(gains: Mapping[Tactic, Sequence[Ratio]]) -> Tactic:
    return max(gains, key=lambda tactic: min(gain.value for gain in gains[tactic]))


def _is_alike(comparisons: Sequence[FinalSamples], tactic: Tactic, winner: Tactic) -> bool:
    """Returns whether `tactic` is at no row count slower than the winner by more than `SETTLED`."""

    def at(samples: FinalSamples) -> bool:
        remains = len(samples.all_us[tactic]) >= len(samples.all_us[winner])
        return remains and samples.mean_ratio(tactic, winner) <= 1 + SETTLED

    return all(map(at, comparisons))


def _compared(samples: FinalSamples, tactic: Tactic, gain: Ratio) -> ComparedRows:
    return ComparedRows(
        rows=samples.rows,
        time_us=fmean(samples.counted(samples.all_us[tactic])),
        default_tactic=samples.default,
        gain=gain.value,
        gain_low=gain.low,
        gain_high=gain.high,
        noise=samples.noise,
        distribution=samples.distribution,
        slowdown=samples.slowdown(tactic) if samples.distribution else None,
    )


def _stress_times(
    bench: BenchLike, tactics: Sequence[Tactic], numbers: Mapping[str, int], samples: int
) -> dict[Tactic, dict[str, float]]:
    """Returns the median times in µs of each tactic on each stress draw, by its factor; infinite if it failed."""
    draws = [draw for _ in range(samples) for draw in numbers.values()]
    taken = bench.samples(tactics, draws)
    return {
        tactic: {
            factor: median(series[at :: len(numbers)]) if series else math.inf for at, factor in enumerate(numbers)
        }
        for tactic, series in zip(tactics, taken, strict=True)
    }
