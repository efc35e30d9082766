import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.search.exhaustive import HOPELESS, LEAST, TOGETHER, WITHIN, exhaustive
from moetune.spec.tactic import Tactic

TACTICS = tuple(Tactic(number=n) for n in range(40))


def _finish(search, times):
    batches = [next(search)]
    while True:
        try:
            batches.append(search.send({tactic: times[tactic] for tactic in batches[-1].tactics if tactic in times}))
        except StopIteration as stop:
            return batches, stop.value


def test_every_tactic_is_in_the_first_batch_and_the_best_come_back_in_order():
    (first, second), finalists = _finish(exhaustive(TACTICS, rounds=3), {t: 100.0 + t["number"] for t in TACTICS})
    assert first.tactics == second.tactics == TACTICS
    assert (first.rounds, second.rounds) == (1, 3)
    assert finalists == TACTICS[:20]


def test_a_hopeless_tactic_is_not_timed_again():
    times = {t: 10.0 if t["number"] else 10.1 * HOPELESS for t in TACTICS}
    (_, second), finalists = _finish(exhaustive(TACTICS), times)
    assert second.tactics == TACTICS[1:]
    assert TACTICS[0] not in finalists


@given(count=st.integers(1, 5 * TOGETHER), data=st.data())
def test_however_many_tactics_few_are_timed_together_and_near_equals_are(count, data):
    tactics = [Tactic(number=number) for number in range(count)]
    times = dict(zip(data.draw(st.permutations(tactics)), range(1000, 1000 + count), strict=True))
    batches, finalists = _finish(exhaustive(tactics), times)
    assert max(len(batch.tactics) for batch in batches) <= TOGETHER
    once, again = ([batch.tactics for batch in batches if batch.rounds == rounds] for rounds in (1, 2))
    assert [tactic for batch in once for tactic in batch] == tactics
    assert [tactic for batch in again for tactic in batch] == sorted(tactics, key=times.get)
    assert finalists == tuple(sorted(tactics, key=times.get)[:20])


def test_the_second_timing_counts():
    search = exhaustive(TACTICS[:2])
    next(search)
    search.send({TACTICS[0]: 1.0, TACTICS[1]: 2.0})
    with pytest.raises(StopIteration) as stop:
        search.send({TACTICS[0]: 3.0, TACTICS[1]: 2.0})
    assert stop.value.value == (TACTICS[1], TACTICS[0])


def test_a_tactic_far_slower_than_the_best_is_no_finalist():
    times = {t: 10.0 if t["number"] < 6 else 10.1 * WITHIN for t in TACTICS}
    assert _finish(exhaustive(TACTICS), times)[1] == TACTICS[:6]


def test_some_finalists_remain_though_the_best_is_far_ahead():
    times = {t: 10.0 * 3 ** t["number"] for t in TACTICS}
    assert _finish(exhaustive(TACTICS), times)[1] == TACTICS[:LEAST]


def test_failed_tactics_are_left_out_and_none_running_gives_none():
    assert _finish(exhaustive(TACTICS[:2]), {TACTICS[1]: 1.0})[1] == (TACTICS[1],)
    assert _finish(exhaustive(TACTICS[:2]), {})[1] == ()
