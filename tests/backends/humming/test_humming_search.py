"""The search of Humming's tactics: what it times, and what it hands to the final comparison."""

import pytest

from moetune.backends.humming.search import FINALISTS, humming_search, lines
from moetune.backends.humming.space import AUTO, tactic_of

FAST = "wgmma-32x256x64-32x32x64-s4-b1-producer-streamk"
SPELLED = (AUTO, FAST, "mma-8x128x64-8x64x32-s4-b4-streamk", "wgmma-16x256x128-16x64x64-s4-b2")
TACTICS = tuple(tactic_of(first, second) for first in SPELLED for second in SPELLED)


def finished(search, times_us):
    """Returns the batches and the finalists of a search whose tactics take `times_us`."""
    batches = [next(search)]
    while True:
        try:
            batches.append(search.send({tactic: times_us(tactic) for tactic in batches[-1].tactics}))
        except StopIteration as stop:
            return batches, stop.value


def test_the_best_of_each_gemm_are_combined():
    cost = dict(zip(SPELLED, (10.0, 7.0, 12.0, 8.0), strict=True))

    def times_us(tactic):
        return cost[tactic["gemm1"]] + 3 * cost[tactic["gemm2"]]

    batches, finalists = finished(humming_search(TACTICS), times_us)
    assert set(batches[0].tactics) == set(lines(TACTICS))
    assert finalists[0] == tactic_of(FAST, FAST) == min(TACTICS, key=times_us)
    assert len(finalists) == FINALISTS


def test_a_warm_start_is_timed_at_once_and_one_that_is_no_candidate_never():
    warm, other = tactic_of(FAST, FAST), tactic_of("mma-32x128x64-32x64x32-s4-b1")
    first = next(humming_search(TACTICS, [warm, other]))
    assert first.tactics[-1] == warm
    assert other not in first.tactics


def test_a_tactic_that_fails_is_no_finalist():
    search = humming_search(TACTICS)
    times = {tactic: 1.0 for tactic in next(search).tactics if FAST not in tactic.values()}
    again = search.send(times)
    assert not any(FAST in tactic.values() for tactic in again.tactics)


def test_nothing_is_proposed_if_nothing_runs():
    search = humming_search(TACTICS)
    next(search)
    with pytest.raises(StopIteration) as stop:
        search.send({})
    assert stop.value.value == ()
