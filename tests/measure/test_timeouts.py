import math

import pytest

from moetune.measure.bench import Activity
from moetune.measure.timeouts import SLOW, STOPPED_FROM_US, Timeouts, slow_limit_us


def test_the_limit_is_a_multiple_of_the_best_time_but_no_less_than_a_tenth_of_a_second():
    assert slow_limit_us([]) == math.inf
    assert slow_limit_us([50_000.0, 20_000.0]) == SLOW * 20_000.0
    assert slow_limit_us([12.0, 5000.0]) == STOPPED_FROM_US == 1e5


@pytest.mark.parametrize(
    ("activity", "limit_us", "limit_s"),
    [
        (Activity.TIMING, math.inf, 34.0),
        (Activity.TIMING, 1e5, 10.4),
        (Activity.TIMING, 60e6, 34.0),
        (Activity.FIRST_RUN, 1e5, 60.0),
        (Activity.CHECK, 1e5, 34.0),
        (Activity.PREPARE, 1e5, 600.0),
    ],
)
def test_only_timings_are_bounded_by_what_was_learned(activity, limit_us, limit_s):
    assert Timeouts().limit_s(activity, 4, limit_us) == pytest.approx(limit_s)
