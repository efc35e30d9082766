"""Medians, paired comparison, noise floor, regret: numbers in, numbers out.

Samples are times in µs (any one unit will do), positive. Two series are *paired* when sample i of both was taken in the
same interleaved round, so that what slows a round down, a clock that drops or a neighbor, slows both.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter, truediv

from moetune.errors import UsageError

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones.

    Raises:
        UsageError: no values.
    """
    if not values:
        raise UsageError("A median needs at least one value.")
    return statistics.median(values)


def geomean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive values: the mean that is right for ratios (Fleming and Wallace 1986).

    Raises:
        UsageError: no values, or one that is not positive.
    """
    if not values or min(values) <= 0:
        raise UsageError(f"A geometric mean needs positive values, given {list(values)}.")
    return statistics.geometric_mean(values)


def paired_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Ratio:
    """mean(numerator) / mean(denominator) of paired samples, with its bootstrap bounds.

    Pairs are resampled whole, and the bounds are percentiles of the resampled ratios (Efron and Tibshirani, *An
    Introduction to the Bootstrap*, 1993, chapters 8 and 13), so noise that both series share cancels out. The bounds
    depend on the samples and the seed alone. With few pairs percentile bounds are a little narrow: with ten normally
    distributed pairs, 95 % bounds hold the truth about nine times in ten.

    Args:
        numerator: samples of the one.
        denominator: samples of the other, as many.
        seed: of the resampling.
        resamples: how many bootstrap ratios are drawn.
        confidence: how much of them lies between the bounds.

    Raises:
        UsageError: fewer than two pairs, lengths that differ, or a sample that is not positive.
    """
    ratios = sorted(_resampled_ratios(numerator, denominator, seed, resamples))
    tail = (1 - confidence) / 2
    return Ratio(sum(numerator) / sum(denominator), _quantile(ratios, tail), _quantile(ratios, 1 - tail))


def noise_floor(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, confidence: float = CONFIDENCE
) -> float:
    """By how much two interleaved timings of the same tactic can be said to differ, relative: the A/A noise floor.

    The upper bound, at `confidence`, of max(r, 1/r) − 1, where r is the bootstrapped ratio of means of the paired
    samples. r is the statistic by which tactics are compared, so a hiccup that could make one look better raises the
    floor as much; and it is a bound, not the difference that happened to be seen, which by luck is sometimes nothing.
    Swapping the series changes nothing.

    Raises:
        UsageError: as for `paired_ratio`.
    """
    ratios = _resampled_ratios(first, second, seed, RESAMPLES)
    return _quantile(sorted(max(ratio, 1 / ratio) - 1 for ratio in ratios), confidence)


def regret(chosen_us: float, best_us: float) -> float:
    """By how much the chosen tactic's time exceeds the best one's on the same load: 0 is perfect, 0.1 is 10 % slower.

    Raises:
        UsageError: a time that is not positive.
    """
    if chosen_us <= 0 or best_us <= 0:
        raise UsageError(f"Times must be positive, given {chosen_us} and {best_us}.")
    return chosen_us / best_us - 1


def _resampled_ratios(
    numerator: Sequence[float], denominator: Sequence[float], seed: int, resamples: int
) -> list[float]:
    """Ratios of the means of pairs drawn with replacement."""
    if len(numerator) != len(denominator) or len(numerator) < 2:
        raise UsageError(
            "A paired comparison needs two series of one length, at least 2; "
            f"given {len(numerator)} and {len(denominator)}."
        )
    if min(*numerator, *denominator) <= 0:
        raise UsageError("A paired comparison needs positive samples.")
    draws = _draws(len(numerator), seed, resamples)
    return list(map(truediv, (sum(draw(numerator)) for draw in draws), (sum(draw(denominator)) for draw in draws)))


@lru_cache(maxsize=4)
def _draws(size: int, seed: int, resamples: int) -> tuple[Callable[[Sequence[float]], tuple[float, ...]], ...]:
    """`resamples` draws of `size` items with replacement, as item getters.

    Drawing costs several times what summing does, and all comparisons of one bucket are of one size: hence the cache.
    """
    generator = random.Random(seed)
    return tuple(itemgetter(*generator.choices(range(size), k=size)) for _ in range(resamples))


def _quantile(ascending: Sequence[float], probability: float) -> float:
    """Linear interpolation between order statistics (type 7 of Hyndman and Fan 1996)."""
    position = probability * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])
