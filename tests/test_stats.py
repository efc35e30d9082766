from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.stats import Ratio, geomean, median, noise_floor, paired_ratio

TIMES = st.floats(0.1, 1e6)
PAIRS = st.lists(st.tuples(TIMES, TIMES), min_size=2, max_size=12)


def normal(generator: random.Random, mean: float, deviation: float, size: int) -> list[float]:
    return [generator.gauss(mean, deviation) for _ in range(size)]


def test_median_is_the_middle_or_the_mean_of_the_two_middle_ones() -> None:
    assert median([9.0, 1.0, 5.0]) == 5.0
    assert median([9.0, 1.0, 5.0, 6.0]) == 5.5


def test_geomean_is_the_nth_root_of_the_product() -> None:
    assert geomean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
    assert geomean([2.0]) == pytest.approx(2.0)


@given(st.lists(TIMES, min_size=1, max_size=20))
def test_geomean_of_inverses_is_the_inverse(values: list[float]) -> None:
    assert geomean([1 / value for value in values]) == pytest.approx(1 / geomean(values))
    assert min(values) * (1 - 1e-9) <= geomean(values) <= max(values) * (1 + 1e-9)


@pytest.mark.parametrize(
    "question",
    [
        lambda: median([]),
        lambda: geomean([]),
        lambda: geomean([1.0, 0.0]),
        lambda: paired_ratio([1.0], [1.0]),
        lambda: paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0]),
        lambda: paired_ratio([1.0, 2.0], [1.0, 0.0]),
        lambda: noise_floor([], []),
    ],
)
def test_question_without_an_answer_is_refused(question) -> None:
    with pytest.raises(UsageError, match=r"needs|must"):
        question()


@settings(max_examples=40)
@given(PAIRS)
def test_ratio_of_means_lies_between_its_bounds_and_those_between_the_extreme_pairs(
    pairs: list[tuple[float, float]],
) -> None:
    numerator, denominator = zip(*pairs, strict=True)
    ratio = paired_ratio(numerator, denominator, confidence=0.999)
    each = [above / below for above, below in pairs]
    assert ratio.value == pytest.approx(statistics.fmean(numerator) / statistics.fmean(denominator))
    assert min(each) * (1 - 1e-9) <= ratio.low <= ratio.high <= max(each) * (1 + 1e-9)


@settings(max_examples=30)
@given(PAIRS, st.floats(0.01, 100))
def test_ratio_scales_with_its_numerator(pairs: list[tuple[float, float]], factor: float) -> None:
    numerator, denominator = zip(*pairs, strict=True)
    ratio = paired_ratio(numerator, denominator)
    scaled = paired_ratio([factor * value for value in numerator], denominator)
    for bound in ("value", "low", "high"):
        assert getattr(scaled, bound) == pytest.approx(factor * getattr(ratio, bound))


@settings(max_examples=20)
@given(st.lists(TIMES, min_size=2, max_size=12), st.floats(0.1, 10))
def test_noise_that_both_series_share_cancels_out(shared: list[float], factor: float) -> None:
    ratio = paired_ratio([factor * value for value in shared], shared)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


@pytest.mark.no_cover
def test_bounds_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = random.Random(2026)
    held, runs, size, truth = 0, 400, 80, 0.9
    for _ in range(runs):
        hiccups = [generator.choice([1.0, 1.0, 1.0, 1.5]) for _ in range(size)]
        slow = [hiccup * value for hiccup, value in zip(hiccups, normal(generator, 100.0, 5.0, size), strict=True)]
        fast = [hiccup * value for hiccup, value in zip(hiccups, normal(generator, 90.0, 5.0, size), strict=True)]
        ratio = paired_ratio(fast, slow)
        held += ratio.low <= truth <= ratio.high
    assert 0.91 <= held / runs <= 0.98


def test_pairing_narrows_the_bounds() -> None:
    generator = random.Random(7)
    drift = normal(generator, 100.0, 20.0, 50)
    slow = [value * generator.gauss(1.0, 0.01) for value in drift]
    fast = [0.97 * value * generator.gauss(1.0, 0.01) for value in drift]
    paired = paired_ratio(fast, slow)
    shuffled = paired_ratio(fast, generator.sample(slow, k=len(slow)))
    assert paired.high < 1.0 < shuffled.high
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 5


def test_more_confidence_means_wider_bounds() -> None:
    generator = random.Random(1)
    first, second = normal(generator, 100.0, 10.0, 30), normal(generator, 100.0, 10.0, 30)
    wide, narrow = (paired_ratio(first, second, confidence=share) for share in (0.99, 0.8))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_same_samples_and_seed_have_the_same_bounds_in_another_process() -> None:
    generator = random.Random(3)
    samples = normal(generator, 100.0, 10.0, 15), normal(generator, 100.0, 10.0, 15)
    code = (
        f"from moetune.stats import paired_ratio; r = paired_ratio(*{samples}, seed=3); print(r.value, r.low, r.high)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert Ratio(*map(float, printed.split())) == paired_ratio(*samples, seed=3)
    assert paired_ratio(*samples, seed=4) != paired_ratio(*samples, seed=3)


def test_noise_floor_of_identical_series_is_nothing() -> None:
    assert noise_floor([3.0, 4.0, 5.0], [3.0, 4.0, 5.0]) == 0.0


@settings(max_examples=30)
@given(PAIRS)
def test_noise_floor_does_not_care_which_series_is_first(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    assert noise_floor(first, second) == pytest.approx(noise_floor(second, first), rel=1e-9, abs=1e-12)
    assert noise_floor(first, second) >= 0.0


def test_noise_floor_covers_a_real_difference_between_the_two_timings() -> None:
    generator = random.Random(5)
    first = normal(generator, 100.0, 1.0, 60)
    second = [1.03 * value for value in normal(generator, 100.0, 1.0, 60)]
    assert 0.03 < noise_floor(first, second) < 0.04


def test_noise_floor_of_one_pair_of_timings_covers_the_difference_of_another() -> None:
    generator = random.Random(11)
    deviation, size, runs, covered, floors = 4.0, 40, 300, 0, []
    for _ in range(runs):
        first, second, third, fourth = (normal(generator, 100.0, deviation, size) for _ in range(4))
        floors.append(noise_floor(first, second))
        covered += abs(statistics.fmean(third) / statistics.fmean(fourth) - 1) <= floors[-1]
    assert covered / runs >= 0.95
    assert median(floors) < 4 * deviation / 100 * math.sqrt(2 / size)


def test_hiccup_raises_the_noise_floor() -> None:
    generator = random.Random(13)
    first, second = normal(generator, 100.0, 1.0, 40), normal(generator, 100.0, 1.0, 40)
    assert noise_floor([*first[:-1], 300.0], second) > 3 * noise_floor(first, second)


def test_twenty_tactics_of_a_hundred_samples_are_compared_in_a_moment() -> None:
    generator = random.Random(17)
    default, *others = (normal(generator, 100.0, 5.0, 100) for _ in range(21))
    start = time.thread_time()
    for series in others:
        paired_ratio(series, default)
    assert time.thread_time() - start < 1.0
