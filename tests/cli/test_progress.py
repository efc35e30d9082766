import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.cli.progress import seconds_left


@pytest.mark.parametrize("costs", [[(8, 3.0)], [(4, 3.0), (8, 1.0)], [(4, 1.0), (8, 3.0)]])
def test_of_few_buckets_the_dearest_stands_for_all(costs):
    assert seconds_left(costs, [16, 32]) == 6.0


@given(st.floats(0, 100), st.floats(0, 1), st.integers(3, 8), st.integers(0, 6))
def test_a_fixed_and_a_proportional_part_are_told_apart(fixed, slope, measured, ahead):
    costs = [(1 << at, fixed + slope * (1 << at)) for at in range(measured)]
    remaining = [1 << (measured + at) for at in range(ahead)]
    expected = ahead * fixed + slope * sum(remaining)
    assert seconds_left(costs, remaining) == pytest.approx(expected, abs=1e-6)


def test_one_disturbed_bucket_does_not_move_the_estimate():
    calm = [(rows, 5.0) for rows in (1, 2, 4, 8, 16)]
    disturbed = [(rows, 60.0 if rows == 8 else 5.0) for rows, _ in calm]
    assert seconds_left(disturbed, [1024]) == seconds_left(calm, [1024]) == 5.0


def test_costs_that_fall_promise_no_negative_time():
    assert seconds_left([(1, 9.0), (2, 6.0), (4, 3.0)], [1024]) == 6.0
