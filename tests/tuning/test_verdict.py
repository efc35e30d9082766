"""The winner is faster than the default at some row count and slower at none; tactics with a cliff cannot win."""

import math
from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import LAYER, tactic
from runs import REGIME
from scripted import DEFAULT, GOOD, NEXT, POOR, TIED, Uneven, compare, final_of

from moetune.stats import Ratio
from moetune.tuning.final_comparison import OPENING
from moetune.tuning.verdict import choice as choice_of
from moetune.tuning.verdict import cliffs, decide, mean_gain, stress_times
from moetune.workload.draws import Draw
from moetune.workload.routing import realize

STRESS = (Draw(None, 8, "search"), Draw(None, 8, "stress", 2))


def _at(rows, default_us, default=DEFAULT, **us):
    """The samples at one row count, of tactics that always take the same time."""
    named = {"good": GOOD, "next": NEXT, "poor": POOR, "default": DEFAULT}
    return final_of({named[name]: (time,) * 20 for name, time in us.items()}, (default_us,) * 20, rows, default)


def test_a_tactic_that_is_slower_in_most_rounds_does_not_win_by_the_default_s_hiccups():
    samples = final_of({GOOD: (15.0,) * 40}, (10.0, 10.0, 10.0, 200.0) * 10)
    assert decide([samples], DEFAULT).tactic == DEFAULT


def test_the_smallest_worst_slowdown_wins():
    """Of three finalists one is best at each row count and much slower at the other."""
    comparisons = [_at(8, 10.0, good=4.0, next=7.0, poor=6.0), _at(6, 10.0, good=8.0, next=5.0, poor=6.5)]
    assert decide(comparisons[:1], DEFAULT).tactic == GOOD
    assert decide(comparisons[1:], DEFAULT).tactic == NEXT
    assert decide(comparisons, DEFAULT).tactic == POOR


def test_of_equal_worst_slowdowns_the_smallest_mean_wins():
    comparisons = [_at(8, 10.0, good=5.0, next=6.0), _at(6, 10.0, good=6.0, next=5.0), _at(12, 9.0, good=5.0, next=5.5)]
    assert decide(comparisons, DEFAULT).tactic == GOOD


def test_a_row_count_with_less_weight_counts_less():
    """`GOOD` is 30 % slower at the first row count, `NEXT` 40 % at the second."""
    comparisons = [_at(8, 10.0, good=6.5, next=5.0), _at(6, 10.0, good=5.0, next=7.0)]
    assert decide(comparisons, DEFAULT).tactic == GOOD
    assert decide(comparisons, DEFAULT, [1.0, 0.5]).tactic == NEXT


def test_a_tactic_that_is_slower_than_the_default_at_any_row_count_cannot_win():
    comparisons = [_at(8, 10.0, good=5.0, next=9.0), _at(12, 10.0, good=10.2, next=9.5)]
    verdict = decide(comparisons, DEFAULT)
    assert verdict.tactic == NEXT
    assert verdict.rejected == {GOOD: "slower than the default by 2.0 % at 12 rows"}


def test_a_tactic_that_is_faster_nowhere_beyond_noise_does_not_replace_the_default():
    comparisons = [_at(8, 10.0, good=10.0), _at(12, 10.0, good=10.0)]
    assert decide(comparisons, DEFAULT).tactic == DEFAULT


def test_a_tactic_that_is_as_fast_at_one_row_count_and_faster_at_another_wins():
    assert decide([_at(8, 10.0, good=10.0), _at(12, 10.0, good=8.0)], DEFAULT).tactic == GOOD


def test_if_the_engine_s_default_differs_by_rows_the_winner_is_slower_than_none_of_them():
    """At 12 rows the engine would run `POOR`, which the bucket's own default is slower than."""
    own = _at(8, 10.0, good=9.0, next=9.5, poor=12.0)
    other = final_of({GOOD: (9.0,) * 20, NEXT: (7.9,) * 20, DEFAULT: (10.0,) * 20}, (8.0,) * 20, 12, POOR)
    assert decide([own, other], DEFAULT).tactic == NEXT


def test_if_every_tactic_is_slower_than_a_default_somewhere_the_least_slow_one_wins():
    own = _at(8, 10.0, good=10.5, poor=20.0)
    other = final_of({GOOD: (8.2,) * 20, DEFAULT: (10.0,) * 20}, (8.0,) * 20, 12, POOR)
    assert decide([own, other], DEFAULT).tactic == GOOD


def test_tactics_that_are_as_fast_as_the_winner_everywhere_are_named():
    comparisons = [_at(8, 10.0, good=5.0, next=5.01, poor=5.0), _at(12, 10.0, good=6.0, next=6.0, poor=6.3)]
    verdict = decide(comparisons, DEFAULT)
    assert {verdict.tactic, *verdict.equally_fast} == {GOOD, NEXT}


def test_a_dropped_tactic_never_wins_over_a_remaining_one():
    samples = final_of({tactic("dropped"): (6.0,) * 6, tactic("remaining"): (5.0,) * 20})
    assert decide([samples], DEFAULT).tactic == tactic("remaining")


def test_regret_is_bounded_by_the_fastest_finalist_s_interval():
    spread = (9.9, 10.1) * 10
    close = final_of({GOOD: tuple(us * 0.9 for us in spread), NEXT: spread[::-1]}, (11.0,) * 20)
    verdict = decide([close], DEFAULT)
    assert verdict.tactic == GOOD
    assert verdict.regret_high == 0.0
    crossing = final_of({GOOD: (9.0, 10.0) * 10, NEXT: (10.0, 9.0) * 10}, (11.0,) * 20)
    assert 0.01 < decide([crossing], DEFAULT).regret_high < 0.1


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.floats(5, 20), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.floats(5, 20), min_size=4, max_size=4),
)
def test_a_winner_is_never_slower_than_one_default_for_all_rows(times, default_us):
    comparisons = [_at(8 + at, default_us[at], good=us[0], next=us[1], poor=us[2]) for at, us in enumerate(times)]
    verdict = decide(comparisons, DEFAULT)
    for samples in comparisons:
        assert fmean(samples.all_us[verdict.tactic]) <= fmean(samples.default_us) * (1 + 1e-9)
    if verdict.tactic == DEFAULT:
        for at in range(3):
            gains = [default_us[row] / us[at] for row, us in enumerate(times)]
            assert min(gains) < 1 or max(gains) <= 1 + 1e-9


@given(st.lists(st.tuples(st.floats(0.5, 4), st.floats(0, 0.2)), min_size=1, max_size=5))
def test_the_mean_gain_lies_within_bounds_that_shrink_with_the_number_of_row_counts(given_ratios):
    gains = [Ratio(value, value * math.exp(-half), value * math.exp(half)) for value, half in given_ratios]
    mean = mean_gain(gains)
    assert mean.low <= mean.value * (1 + 1e-12)
    assert mean.high >= mean.value * (1 - 1e-12)
    assert math.log(mean.high / mean.value) <= max(half for _, half in given_ratios) + 1e-9
    if len(gains) == 1:
        assert (mean.value, mean.low, mean.high) == pytest.approx((gains[0].value, gains[0].low, gains[0].high))


@pytest.mark.parametrize("default_us", [50.0, 10.4, 8.0])
def test_a_choice_s_times_are_the_means_of_what_counts_and_differ_by_the_gain(default_us):
    bench = Uneven({DEFAULT: (default_us, default_us), **TIED}, spread=0.05)
    samples = compare(bench, DEFAULT, [GOOD, NEXT], seconds=1e-6)
    verdict = decide([samples], DEFAULT)
    routings = [realize(LAYER, REGIME, 4)]
    record = choice_of([samples], verdict, bench, routings, rows=8, default=DEFAULT, tried=3, candidates=3)
    assert record.tactic == (DEFAULT if default_us == 8.0 else verdict.tactic)
    counted = samples.all_us[record.tactic][OPENING if default_us == 50.0 else 0 :]
    assert record.time_us == pytest.approx(fmean(counted))
    assert record.default_time_us / record.time_us == pytest.approx(record.gain)
    assert [compared.rows for compared in record.by_rows] == [8]
    if default_us == 50.0:
        opening = samples.all_us[record.tactic][:OPENING]
        assert record.gain == pytest.approx(fmean(samples.default_us) / fmean(opening))


def test_a_choice_of_several_row_counts_has_the_gain_of_each_and_their_geometric_mean():
    other = final_of({GOOD: (4.0,) * 20, DEFAULT: (12.0,) * 20}, (8.0,) * 20, 12, POOR)
    comparisons = [other, _at(8, 10.0, good=5.0, poor=9.0)]
    verdict = decide(comparisons, DEFAULT)
    bench = Uneven({})
    routings = [realize(LAYER, REGIME, 4)]
    record = choice_of(comparisons, verdict, bench, routings, rows=8, default=DEFAULT, tried=3, candidates=3)
    assert [(each.rows, each.gain, each.default_tactic) for each in record.by_rows] == [
        (8, 2.0, DEFAULT),
        (12, 2.0, POOR),
    ]
    assert record.gain == pytest.approx(2.0)
    assert (record.time_us, record.default_time_us, record.default_tactic) == (5.0, 10.0, DEFAULT)


class _Stressed:
    """A bench that answers what is planted, one list of samples a call, and counts the calls of each tactic."""

    def __init__(self, **planted):
        self.failures, self.calls, self._planted = {}, Counter(), {tactic(name): them for name, them in planted.items()}

    def samples(self, tactics, draws):
        answers = []
        for one in tactics:
            answers.append(self._planted[one][self.calls[one]])
            self.calls[one] += 1
        assert all(answer is None or len(answer) == len(draws) for answer in answers)
        return answers


def _stressed(**planted):
    bench = _Stressed(default=[(20.0,), (20.0,) * 5], next=[(7.0,), (7.0,) * 5], **planted)
    times = stress_times(bench, (tactic("other"), NEXT), DEFAULT, STRESS, {})
    return times, cliffs(times, DEFAULT, {}), bench


def test_if_no_tactic_has_a_cliff_all_are_timed_once_on_a_stress_draw():
    times, steep, bench = _stressed(other=[(10.0,)])
    assert times[tactic("other")] == {"2": 10.0}
    assert steep == {}
    assert set(bench.calls.values()) == {1}


def test_if_one_seems_to_have_a_cliff_all_are_timed_again_and_the_medians_count():
    _, steep, bench = _stressed(other=[(30.0,), (31.0, 32.0, 8.0, 8.0, 33.0)])
    assert "4.4 times" in steep[tactic("other")]
    assert set(bench.calls.values()) == {2}


def test_a_tactic_that_is_as_much_slower_without_stress_has_no_cliff():
    times = {GOOD: {"2": 10.0}, NEXT: {"2": 30.0}, DEFAULT: {"2": 40.0}}
    assert cliffs(times, DEFAULT, {}).keys() == {NEXT}
    assert cliffs(times, DEFAULT, {GOOD: 5.0, NEXT: 6.0}).keys() == {NEXT}
    assert cliffs(times, DEFAULT, {GOOD: 5.0, NEXT: 8.0}) == {}


def test_a_hiccup_under_stress_is_no_cliff():
    times, steep, _ = _stressed(other=[(30.0,), (8.0, 30.0, 8.0, 30.0, 8.0)])
    assert times[tactic("other")] == {"2": 8.0}
    assert tactic("other") not in steep


def test_a_tactic_that_fails_under_stress_has_no_cliff_but_an_infinite_time():
    times, steep, _ = _stressed(other=[None, None])
    assert times[tactic("other")] == {"2": math.inf}
    assert tactic("other") not in steep
