"""A time budget is split among buckets, searches and final comparisons."""

import planted_time
import pytest
from planted import PlantedBackend, tactic
from runs import tune_planted

from moetune.search.base import Batch
from moetune.spec.regime import Regime
from moetune.tuning import bucket_tuner as bucket_module
from moetune.tuning import final_comparison as final_module
from moetune.tuning.bucket_tuner import FINAL_SHARE
from moetune.tuning.events import (
    BucketsSkipped,
    SearchStopped,
)


@pytest.fixture
def finals_s(monkeypatch):
    """Of every final comparison: about how long it may take, and how long if it is prolonged."""
    given, real = [], bucket_module.compare_right_ones

    def recorded(bench, default, finalists, draws, rows, *, seconds, most_s):
        given.append((seconds, most_s))
        return real(bench, default, finalists, draws, rows, seconds=0.01, most_s=min(most_s, 0.01))

    monkeypatch.setattr(bucket_module, "compare_right_ones", recorded)
    return given


@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_a_backend_says_how_long_its_finals_may_take(plant, seconds, finals_s):
    backend = plant(milliseconds={"default": 1.0, "fast": 0.1})
    tune_planted()
    backend.final_s = seconds
    tune_planted(again=True)
    assert finals_s == [(None, final_module.SECONDS)] * 2 + [(seconds, final_module.SECONDS)] * 2


@pytest.mark.parametrize("time_budget_s", [None, 1e4, 1.0, 0.02])
def test_a_final_takes_no_more_than_its_share_of_the_time(plant, time_budget_s, finals_s):
    plant(milliseconds={"default": 0.2, "fast": 0.1})
    tune_planted(time_budget_s=time_budget_s)
    most = [most_s for _, most_s in finals_s]
    assert most
    if time_budget_s in (None, 1e4):
        assert set(most) == {final_module.SECONDS}
    else:
        assert all(0 <= most_s <= FINAL_SHARE * time_budget_s for most_s in most)


def test_a_time_budget_ends_searches_early_and_leaves_the_last_buckets_to_the_next_run(plant, planted_budget):
    backend = plant(milliseconds={"default": 5.0, "slow": 5.0})

    def search(problem, candidates, warm_starts):
        yield Batch((tactic("default"),))
        yield Batch((tactic("slow"),), rounds=100)
        raise AssertionError("the search must have been ended")

    backend.search = search
    events = []
    profile = tune_planted(time_budget_s=0.004, on_event=events.append)
    assert [choice.rows for choice in profile.choices] == [4]
    assert [event for event in events if isinstance(event, BucketsSkipped)] == [BucketsSkipped((8,))]
    assert [event for event in events if isinstance(event, SearchStopped)] == [SearchStopped(4, 1, 2)]
    assert [choice.rows for choice in tune_planted(strategy="exhaustive").choices] == [4, 8]


def test_the_preparation_of_a_bucket_counts_against_its_share(plant, planted_budget, monkeypatch):
    backend = plant(milliseconds={"default": 5.0})
    real, batches = PlantedBackend.prepare, []

    def prepare(self, problem):
        planted_time.spend(400)
        return real(self, problem)

    def search(problem, candidates, warm_starts):
        while True:
            batches.append((yield Batch((tactic("default"),))))

    monkeypatch.setattr(PlantedBackend, "prepare", prepare)
    backend.search = search
    tune_planted(Regime(ladder="4", draws=4), time_budget_s=0.42)
    assert len(batches) < 10  # 0.6 of 0.42 s are 50
