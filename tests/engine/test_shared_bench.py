"""A real `tune` of the first rank, whose times all ranks take. The ranks are threads, and their benches are planted."""

import threading
import weakref

import pytest
from planted import LAYER, PlantedBackend, tactic
from planted_benches import PlantedBenches
from test_exchange import PlantedTime, run

from moetune.engine import exchange
from moetune.engine.shared_bench import tuned_together
from moetune.errors import LostRankError, NoResultError, RankError
from moetune.spec.regime import Regime
from moetune.tuning.tune import tune

REGIME = Regime(ep_size=2, ladder=(2, 4, 8), tune_max_num_tokens=8, draws=2)
US = {"default": 100.0, "fast": 50.0, "other": 70.0}


def rank(times=US, fails=(), refuses=None):
    """The benches of one rank. `fails`: the reasons by algorithm."""
    return PlantedBenches(
        lambda one: times[str(one["algorithm"])], {tactic(name): why for name, why in dict(fails).items()}, refuses
    )


def tuned(tmp_path, *ranks):
    """What each rank gets. A rank is its benches, or a function of its exchange."""
    saved = []

    def act(benches):
        if callable(benches):
            return benches

        def on(exchange):
            def of_first(shared):
                saved.append(threading.current_thread())
                backend = PlantedBackend({"default": 1.0, "fast": 1.0, "other": 1.0})
                return tune(LAYER, REGIME, backend, tmp_path, device="cpu", isolate=False, open_benches=shared)

            backend = PlantedBackend({})
            return tuned_together(of_first, benches.open_benches, backend, f"cpu:{exchange.rank}", exchange)

        return on

    found = run(*map(act, ranks))
    assert len(saved) == 1, "one rank tunes and writes"
    return found


def names(profile):
    return {str(choice.tactic["algorithm"]) for choice in profile.choices}


def test_all_ranks_take_times_and_get_the_same_profile(tmp_path):
    ranks = [rank() for _ in range(3)]
    first, *others = tuned(tmp_path, *ranks)
    assert names(first) == {"fast"}
    assert [choice.rows for choice in first.choices] == [2, 4, 8]
    assert others == [first] * 2
    assert ranks[1].asked == ranks[2].asked == ranks[0].asked
    assert ranks[1].asked
    assert [rows for rows, _ in ranks[1].problems] == [rows for rows, _ in ranks[0].problems]
    assert {device for _, device in ranks[2].problems} == {"cpu:2"}, "each on its own device"


def test_the_slowest_rank_decides(tmp_path):
    slow = rank({"default": 1000.0, "fast": 900.0, "other": 700.0})
    found = tuned(tmp_path, rank(), rank(), slow)
    for profile in found:
        assert names(profile) == {"other"}
        assert {choice.time_us for choice in profile.choices} == {700.0}


def test_a_tactic_that_fails_on_one_rank_wins_nowhere_and_the_rank_is_named(tmp_path):
    found = tuned(tmp_path, rank(), rank(fails={"fast": "RuntimeError: planted"}))
    for profile in found:
        assert names(profile) == {"other"}
        for choice in profile.choices:
            reasons = {str(one.tactic["algorithm"]): one.reason for one in choice.rejected}
            assert reasons["fast"] == "Rank 1 of 2: RuntimeError: planted"


def test_a_rank_that_cannot_prepare_a_problem_ends_the_tune_on_all(tmp_path):
    first, second = tuned(tmp_path, rank(), rank(refuses=MemoryError("planted")))
    assert isinstance(first, NoResultError)
    assert "Rank 1 of 2 failed: out of memory: MemoryError: planted" in str(first)
    assert isinstance(second, RankError)
    assert "Rank 0 of 2, which tunes for all, failed: Rank 1 of 2 failed: out of memory" in str(second)


def test_a_default_that_fails_on_another_rank_is_an_error_on_all(tmp_path):
    first, second = tuned(tmp_path, rank(), rank(fails={"default": "RuntimeError: planted"}))
    assert isinstance(first, NoResultError)
    assert "Rank 1 of 2: RuntimeError: planted" in str(first)
    assert isinstance(second, RankError)


def test_a_rank_that_is_lost_ends_the_tune(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "time", planted_time := PlantedTime())
    found = tuned(tmp_path, rank(), rank(), lambda lost: planted_time.begin(lost.store, 1, (0, 1)))
    assert {type(error) for error in found[:2]} == {LostRankError}
    assert "Rank 2 of 3 gave no sign of life for 30 s" in str(found[0])
    assert "the tune of planted" in str(found[0])


def test_what_the_first_rank_no_longer_needs_is_released_on_all(tmp_path):
    made, living = [], []

    class Counted(PlantedBenches):
        def bench_of(self, problem):
            bench = super().bench_of(problem)
            living.append(sum(one() is not None for one in made))
            made.append(weakref.ref(bench))
            return bench

    tuned(tmp_path, rank(), Counted(rank().us))
    assert len(made) > 2
    assert max(living) < len(made) - 1, "not all of them are kept"


@pytest.mark.parametrize("fails", [{"fast": "a"}, {"fast": "a", "other": "b"}])
def test_what_has_failed_anywhere_is_not_asked_again(tmp_path, fails):
    ranks = rank(), rank(fails=fails)
    tuned(tmp_path, *ranks)
    assert ranks[0].asked == ranks[1].asked
