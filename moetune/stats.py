"""Medians, geometric means, paired comparison and A/A noise of measured times.

Samples are positive times, all in one unit. Two series are *paired* if sample i of both was taken in the same
interleaved round. Then whatever slows a round down, such as a lower clock rate, slows both.
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
    """Returns the middle value, or the mean of the two middle ones.

    Raises:
        UsageError: no values.
    """
    if not values:
        raise UsageError("A median needs at least one value.")
    return statistics.median(values)


def geomean(values: Sequence[float]) -> float:
    """Returns the n-th root of the product of n positive values, the right mean for ratios (Fleming and Wallace 1986).

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
    """Returns mean(numerator) / mean(denominator) of paired samples, with its bootstrap bounds.

    Pairs are resampled whole, and the bounds are percentiles of the resampled ratios (Efron and Tibshirani, *An
    Introduction to the Bootstrap*, 1993, chapters 8 and 13). So noise that both series share cancels out. The bounds
    depend on the samples and the seed alone. With few pairs they are a little narrow: 95 % bounds of ten normally
    distributed pairs contain the true ratio about nine times in ten.

    Args:
        numerator: samples of one series.
        denominator: as many samples of the other.
        seed: seed of the resampling.
        resamples: how many bootstrap ratios are computed.
        confidence: the share of them that lies between the bounds.

    Raises:
        UsageError: fewer than two pairs, different lengths, or a sample that is not positive.
    """
    ratios = sorted(_resampled_ratios(numerator, denominator, seed, resamples))
    tail = (1 - confidence) / 2
    return Ratio(sum(numerator) / sum(denominator), _quantile(ratios, tail), _quantile(ratios, 1 - tail))


def noise_floor(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, confidence: float = CONFIDENCE
) -> float:
    """Returns the A/A noise: how much two interleaved timings of one tactic can differ, relative.

    It is the upper bound, at `confidence`, of max(r, 1/r) − 1, where r is the bootstrapped ratio of the means. Tactics
    are compared by the same statistic. A bound is used because the observed difference can be zero by luck. Swapping
    the series changes nothing.

    Raises:
        UsageError: as `paired_ratio`.
    """
    ratios = _resampled_ratios(first, second, seed, RESAMPLES)
    return _quantile(sorted(max(ratio, 1 / ratio) - 1 for ratio in ratios), confidence)


def _resampled_ratios(
    numerator: Sequence[float], denominator: Sequence[float], seed: int, resamples: int
) -> list[float]:
    """Returns the ratios of the means of pairs that are drawn with replacement."""
    if len(numerator) != len(denominator) or len(numerator) < 2:
        raise UsageError(
            "A paired comparison needs two series of one length, at least 2; "
            f"given {len(numerator)} and {len(denominator)}."
        )
    if min(*numerator, *denominator) <= 0:
        raise UsageError("A paired comparison needs positive samples.")
    sums = (_resampled_sums(tuple(series), seed, resamples) for series in (numerator, denominator))
    return list(map(truediv, *sums))


@lru_cache(maxsize=128)
def _resampled_sums(series: tuple[float, ...], seed: int, resamples: int) -> tuple[float, ...]:
    """Returns the sums of one series in `resamples` resamplings. Cached, as a bucket's series are compared in pairs."""
    return tuple(sum(draw(series)) for draw in _draws(len(series), seed, resamples))


@lru_cache(maxsize=16)
def _draws(size: int, seed: int, resamples: int) -> tuple[Callable[[Sequence[float]], tuple[float, ...]], ...]:
    """Returns `resamples` choices of `size` items with replacement, as item getters.

    Choosing takes several times longer than summing, and all comparisons of a bucket have one size, so it is cached.
    NumPy's generator would be shorter, but it gives other bounds than those in stored profiles.
    """
    generator = random.Random(seed)
    return tuple(itemgetter(*generator.choices(range(size), k=size)) for _ in range(resamples))


def _quantile(ascending: Sequence[float], probability: float) -> float:
    """Returns a quantile by linear interpolation (type 7 of Hyndman and Fan 1996)."""
    position = probability * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])
