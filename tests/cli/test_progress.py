import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.cli.progress import Progress, seconds_left
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice
from moetune.tuning.events import BucketChosen, BucketStarted, TacticMeasured


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


GAINED = {"gain": 1.25, "gain_low": 1.2, "gain_high": 1.3}
TACTIC = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


@pytest.mark.parametrize(
    ("default", "said"),
    [
        (TACTIC, "[1/2] 8 rows: 51.2 µs, the default, by 16×64×128 group=1 warps=4 stages=3 · about"),
        (
            {**TACTIC, "num_warps": 8},
            "[1/2] 8 rows: 51.2 µs, 1.25× the default, by 16×64×128 group=1 warps=4 stages=3 · ",
        ),
    ],
)
def test_a_finished_bucket_is_a_line_where_no_terminal_shows_a_bar(default, said, capsys):
    choice = Choice(
        rows=8,
        tactic=TACTIC,
        time_us=51.2,
        default_tactic=default,
        default_time_us=51.2 if default == TACTIC else 64.0,
        **({"gain": 1.0, "gain_low": 1.0, "gain_high": 1.0} if default == TACTIC else GAINED),
        noise=0.01,
        tried=6,
        candidates=6,
        load=(1,),
        max_load=1,
        measured_at="2026-01-31T12:00:00Z",
    )
    with Progress([8, 64]) as progress:
        progress(BucketStarted(8, 0, 2, 6, {}))
        progress(BucketChosen(choice, 0, 2))
    assert capsys.readouterr().err.startswith(said)


def test_a_tactic_that_failed_is_named_shortly(capsys):
    with Progress([8]) as progress:
        progress(BucketStarted(8, 0, 1, 6, {}))
        progress(TacticMeasured(8, Tactic(TACTIC), None, "out of shared memory"))
    assert capsys.readouterr().err == "8 rows: 16×64×128 group=1 warps=4 stages=3 failed: out of shared memory\n"
