import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.cli.progress import seconds_left


def test_one_measured_bucket_stands_for_all():
    assert seconds_left([(8, 3.0)], [16, 32]) == 6.0


def test_a_fixed_and_a_proportional_part_are_told_apart():
    costs = [(rows, 2.0 + 0.5 * rows) for rows in (4, 8)]
    assert seconds_left(costs, [16, 32]) == pytest.approx(2 * 2.0 + 0.5 * 48)


def test_a_bucket_that_was_cheaper_than_the_one_before_does_not_promise_a_negative_time():
    assert seconds_left([(4, 9.0), (8, 1.0)], [1024]) == 1.0


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=6), st.integers(0, 6))
def test_a_wait_is_at_least_the_last_cost_for_each_bucket(seconds, ahead):
    costs = [(1 << at, cost) for at, cost in enumerate(seconds)]
    remaining = [1 << (len(seconds) + at) for at in range(ahead)]
    assert seconds_left(costs, remaining) >= ahead * seconds[-1] * (1 - 1e-9)
