"""The ranks are threads of this process. They share a key-value store of torch.distributed in memory."""

import random
import threading
import time

import pytest
from processes import GIVE_UP_S, eventually
from torch.distributed import HashStore

from moetune.engine import exchange
from moetune.engine.exchange import Exchange
from moetune.engine.ranks import from_first, gather, leads, together, writes
from moetune.errors import LostRankError, RankError, UnsupportedError
from moetune.store.store import Store


class PlantedTime:
    """Stands for the module `time` of `exchange`. Time passes as ranks wait, but only once `begin` has been called."""

    def __init__(self):
        self.now_s, self._begun = 0.0, threading.Event()

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        if self._begun.is_set():
            self.now_s += seconds
        time.sleep(0.001)

    def begin(self, store, turn, ranks):
        """Lets time pass once these ranks have given their values of a turn, so that no other one is missing."""
        assert eventually(lambda: store.check([f"{turn}/{rank}" for rank in ranks]))
        self._begun.set()


@pytest.fixture
def planted_time(monkeypatch):
    planted = PlantedTime()
    monkeypatch.setattr(exchange, "time", planted)
    return planted


def run(*acts, timeout_s=30.0, members=None):
    """What each rank's function returns or raises. It is called with the rank's exchange."""
    store = HashStore()
    members = members or range(len(acts))
    exchanges = [Exchange(store, rank, members, timeout_s) for rank in range(len(acts))]
    found = [None] * len(acts)

    def at(rank):
        try:
            found[rank] = acts[rank](exchanges[rank])
        except Exception as error:
            found[rank] = error
        exchanges[rank].end()

    threads = [threading.Thread(target=at, args=(rank,), daemon=True) for rank in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GIVE_UP_S)
    return found


def same(act, ranks=4, **options):
    return run(*[act] * ranks, **options)


def test_each_rank_gets_all_values_in_rank_order():
    assert (
        same(lambda ranks: [ranks.gather((turn, ranks.rank)) for turn in range(20)])
        == [[[(turn, rank) for rank in range(4)] for turn in range(20)]] * 4
    )


def test_what_was_exchanged_is_deleted():
    def act(ranks):
        for turn in range(50):
            ranks.gather(turn)
        return ranks.store.num_keys()

    assert max(same(act)) < 20


def test_a_rank_that_never_comes_is_named_and_the_others_wait_no_longer_than_the_time_out(planted_time):
    def waits(ranks):
        ranks.step = "the sweep"
        began = planted_time.monotonic()
        with pytest.raises(LostRankError) as raised:
            ranks.gather(None)
        return str(raised.value), planted_time.monotonic() - began

    def never_comes(ranks):
        planted_time.begin(ranks.store, 1, (0, 1, 3))

    found = run(waits, waits, never_comes, waits, timeout_s=1.0, members=(4, 5, 6, 7))
    assert found[2] is None
    assert len({found[rank][0] for rank in (0, 1, 3)}) == 1
    message, waited_s = found[0]
    assert message.startswith("Rank 2 of 4 (rank 6 of the world) gave no sign of life for 1 s")
    assert "'the sweep'" in message
    assert 1.0 < waited_s < 2.0


def test_a_rank_that_leaves_is_lost(planted_time):
    def leaves(ranks):
        ranks.gather("first")
        ranks.end()
        planted_time.begin(ranks.store, 2, (1,))

    def stays(ranks):
        ranks.gather("first")
        return ranks.gather("second")

    _, error = run(leaves, stays, timeout_s=1.0)
    assert isinstance(error, LostRankError)
    assert "Rank 0 of 2" in str(error)


def test_a_slow_rank_that_is_alive_is_waited_for(planted_time):
    def signs_of_life(ranks):
        return ranks.store.add("alive/0", 0)

    def slow(ranks):
        ranks.begin()
        for _ in range(20):
            before = signs_of_life(ranks)
            assert eventually(lambda before=before: signs_of_life(ranks) > before)
            planted_time.now_s += 0.6 * ranks.timeout_s
        return ranks.gather("late")

    assert run(slow, lambda ranks: ranks.gather("soon"), timeout_s=0.5) == [["late", "soon"]] * 2
    assert planted_time.now_s == pytest.approx(6.0)


def test_a_rank_that_is_alive_but_stuck_is_lost_too(monkeypatch):
    monkeypatch.setattr(exchange, "SLOWEST_S", 0.5)
    released = threading.Event()

    def stuck(ranks):
        ranks.begin()
        released.wait(GIVE_UP_S)

    def waits(ranks):
        try:
            return ranks.gather(None)
        finally:
            released.set()

    _, error = run(stuck, waits)
    assert "Rank 0 of 2 is alive, but did not reach" in str(error)


def test_a_rank_that_comes_too_late_gets_the_same_error(planted_time):
    lost = threading.Event()

    def late(ranks):
        planted_time.begin(ranks.store, 1, (1, 2))
        lost.wait(GIVE_UP_S)
        return ranks.gather(None)

    def soon(ranks):
        try:
            return ranks.gather(None)
        finally:
            lost.set()

    errors = run(late, soon, soon, timeout_s=1.0)
    assert {type(error) for error in errors} == {LostRankError}
    assert len(set(map(str, errors))) == 1


def test_all_ranks_see_the_same_outcome_however_late_each_is(monkeypatch):
    monkeypatch.setattr(Exchange, "begin", lambda self: None)  # no signs of life: only the time decides
    monkeypatch.setattr(exchange, "PAUSES_S", (0.001, 0.004))

    def act(ranks):
        pauses = random.Random(ranks.rank)
        outcomes = []
        for turn in range(40):
            time.sleep(pauses.choice((0, 0, 0, 0.01, 0.02, 0.03, 0.06)))
            try:
                outcomes.append(tuple(ranks.gather(turn)))
            except LostRankError as error:
                outcomes.append(str(error))
        return outcomes

    first, *others = same(act, timeout_s=0.02)
    assert others == [first] * 3
    assert any(isinstance(outcome, str) for outcome in first), "some turns fail"


def test_ranks_that_do_different_things_get_an_error_that_names_both():
    def act(ranks):
        ranks.step = "the call of a" if ranks.rank == 1 else "the call of b"
        return ranks.gather(None)

    errors = same(act, ranks=3)
    assert len(set(map(str, errors))) == 1
    assert str(errors[0]).startswith("Rank 1 of 3 is at 'the call of a', but Rank 0 of 3 is at 'the call of b'.")


def test_a_store_that_has_ended_is_an_error_that_names_this_rank():
    class Ended:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(LostRankError, match=r"Rank 1 of 2 does not reach .* Connection reset by peer"):
        Exchange(Ended(), 1, (0, 1)).gather(None)


def test_a_failure_on_one_rank_is_one_on_all_and_they_go_on_together():
    def act(ranks):
        try:
            together(lambda: 1 // (2 - ranks.rank), ranks)
        except (ZeroDivisionError, RankError) as error:
            return type(error).__name__, str(error), together(lambda: ranks.rank, ranks)

    found = same(act)
    assert found[2] == ("ZeroDivisionError", "integer division or modulo by zero", 2)
    for rank in (0, 1, 3):
        assert found[rank][0] == "RankError"
        assert "Rank 2 of 4 failed: ZeroDivisionError" in found[rank][1]
        assert found[rank][2] == rank


def test_the_first_rank_answers_for_all():
    called = []

    def make(ranks):
        called.append(ranks.rank)
        return {"rank": ranks.rank}

    assert same(lambda ranks: from_first(lambda: make(ranks), ranks)) == [{"rank": 0}] * 4
    assert called == [0]


def test_if_the_first_rank_cannot_answer_all_get_the_reason():
    def fails():
        raise UnsupportedError("planted")

    first, *others = same(lambda ranks: from_first(fails, ranks))
    assert isinstance(first, UnsupportedError)
    for error in others:
        assert isinstance(error, RankError)
        assert "Rank 0 of 4, which answers for all, failed: planted." in str(error)


def test_of_the_ranks_with_the_same_store_one_writes(tmp_path):
    shared, own = Store(tmp_path / "shared"), Store(tmp_path / "own")
    assert same(lambda ranks: writes(own if ranks.rank == 2 else shared, ranks)) == [True, False, True, False]


def test_without_other_ranks_everything_is_local(tmp_path):
    assert gather("mine", None) == ["mine"]
    assert together(lambda: 3, None) == from_first(lambda: 3, None) == 3
    assert leads(None)
    assert writes(Store(tmp_path), None)
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 // 0, None)
