import pytest

from moetune.search.exhaustive import LEAST, WITHIN, exhaustive
from moetune.spec.tactic import Tactic

TACTICS = tuple(Tactic(number=n) for n in range(40))


def _finish(search, times):
    batch = next(search)
    with pytest.raises(StopIteration) as stop:
        search.send({tactic: times[tactic] for tactic in batch.tactics if tactic in times})
    return batch, stop.value.value


def test_every_tactic_is_in_the_one_batch_and_the_best_come_back_in_order():
    batch, finalists = _finish(exhaustive(TACTICS, rounds=3), {t: 100.0 + t["number"] for t in TACTICS})
    assert batch.tactics == TACTICS
    assert batch.rounds == 3
    assert finalists == TACTICS[:20]


def test_a_tactic_far_behind_the_best_is_no_finalist():
    times = {t: 10.0 if t["number"] < 6 else 10.1 * WITHIN for t in TACTICS}
    assert _finish(exhaustive(TACTICS), times)[1] == TACTICS[:6]


def test_some_finalists_remain_though_the_best_is_far_ahead():
    times = {t: 10.0 * 3 ** t["number"] for t in TACTICS}
    assert _finish(exhaustive(TACTICS), times)[1] == TACTICS[:LEAST]


def test_failed_tactics_are_left_out_and_none_running_gives_none():
    assert _finish(exhaustive(TACTICS[:2]), {TACTICS[1]: 1.0})[1] == (TACTICS[1],)
    assert _finish(exhaustive(TACTICS[:2]), {})[1] == ()
