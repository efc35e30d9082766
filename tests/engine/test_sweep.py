"""Joins the sweeps of ranks. A tactic is FlashInfer's own: here a pair."""

import math

import pytest

from moetune.engine.exchange import Exchange
from moetune.engine.strategy import RankStrategy
from moetune.engine.sweep import Sweep, joined
from moetune.spec.tactic import Tactic

A, B, C = (16, 1), (8, 0), (8, 1)
MERGE, PARALLEL = RankStrategy.MERGE, RankStrategy.PARALLEL
RANKS = Exchange(None, 0, (0, 1))


def sweep(times, failures=()):
    """A sweep of 4 rows."""
    made = Sweep()
    for tactic, time_ms in times.items():
        made.timed(4, tactic, time_ms)
    for tactic in failures:
        made.failed(4, tactic, RuntimeError("planted"))
    return made


def test_the_time_of_a_tactic_is_that_on_the_slowest_rank():
    found = joined([sweep({A: 1.0, B: 2.0}), sweep({B: 5.0, A: 0.5})], MERGE, RANKS)
    assert found.milliseconds == {4: [(A, 1.0), (B, 5.0)]}
    assert not found.failures


def test_the_result_does_not_depend_on_the_rank_that_joins():
    sweeps = [sweep({A: 1.0, B: 2.0}), sweep({B: 5.0, A: 0.5})]
    assert [joined(sweeps, MERGE, Exchange(None, rank, (0, 1))).milliseconds for rank in range(2)] == [
        joined(sweeps, MERGE, RANKS).milliseconds
    ] * 2


def test_a_tactic_that_failed_on_one_rank_has_no_time_and_the_rank_is_named():
    found = joined([sweep({A: 1.0, B: 2.0}), sweep({B: 5.0}, [A])], MERGE, RANKS)
    assert found.milliseconds == {4: [(B, 5.0)]}
    reason = "Rank 1 of 2: RuntimeError: planted"
    assert found.failures == {4: {Tactic(tile_n=16, config=1): reason}}
    assert found.uneven == {Tactic(tile_n=16, config=1): reason}


def test_a_tactic_that_failed_on_all_ranks_is_no_uneven_one():
    found = joined([sweep({B: 2.0}, [A]), sweep({B: 5.0}, [A])], MERGE, RANKS)
    assert found.failures[4].keys() == {Tactic(tile_n=16, config=1)}
    assert not found.uneven


@pytest.mark.parametrize("missing", [{B: 1.0}, {A: math.inf, B: 1.0}])
def test_a_tactic_that_a_rank_has_not_timed_has_no_time(missing):
    assert joined([sweep({A: 1.0, B: 2.0}), sweep(missing)], MERGE, RANKS).milliseconds == {4: [(B, 2.0)]}


def test_a_bucket_that_one_rank_has_not_swept_is_left_out():
    assert not joined([sweep({A: 1.0}), Sweep()], MERGE, RANKS).milliseconds


def test_in_parallel_one_rank_times_a_tactic_for_all():
    found = joined([sweep({A: 1.0, C: 3.0}), sweep({B: 2.0})], PARALLEL, RANKS)
    assert sorted(found.milliseconds[4]) == sorted([(A, 1.0), (B, 2.0), (C, 3.0)])


def test_a_sweep_of_one_rank_stays_as_it_is():
    alone = sweep({A: 1.0, B: 2.0}, [C])
    found = joined([alone], MERGE, None)
    assert found.milliseconds == alone.milliseconds
    assert found.failures == {4: {Tactic(tile_n=8, config=1): "RuntimeError: planted"}}
