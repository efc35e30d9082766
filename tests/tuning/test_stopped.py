"""A tactic that needs far longer than the best so far is stopped, and says so; the default never is."""

import planted_time
import pytest
from planted import LAYER, PlantedBackend, tactic
from runs import REGIME

from moetune.measure.bench import Bench
from moetune.search.base import Batch
from moetune.tuning import final_comparison
from moetune.tuning.tune import tune


class InTwoBatches(PlantedBackend):
    def search(self, problem, candidates, warm_starts=()):
        times = yield Batch((tactic("fast"),), 1)
        times |= yield Batch((tactic("slow"), tactic("other")), 1)
        times |= yield Batch((tactic("default"),), 1)
        return tuple(sorted(times, key=times.get))


@pytest.fixture
def limits(monkeypatch):
    """The limit of each call of `Bench.samples` with one draw, by tactic."""
    found, samples = {}, Bench.samples

    def spied(self, tactics, draws, limit_us=float("inf")):
        for each in tactics:
            found.setdefault(each, limit_us)
        return samples(self, tactics, draws, limit_us)

    monkeypatch.setattr(Bench, "samples", spied)
    monkeypatch.setattr(final_comparison, "SECONDS", 0.02)
    return found


def test_the_search_bounds_what_comes_after_the_first_times_except_the_default(limits, tmp_path):
    backend = InTwoBatches(milliseconds={"default": 1.0, "fast": 0.5, "slow": 2.0, "other": 0.6})
    tune(LAYER, REGIME, backend, tmp_path, isolate=False, device="cpu")
    assert limits[tactic("fast")] == float("inf"), "nothing is known yet"
    assert limits[tactic("slow")] == limits[tactic("other")] == 1e5
    assert limits[tactic("default")] == float("inf")


def test_a_stopped_tactic_is_listed_with_the_reason(limits, tmp_path, monkeypatch):
    monkeypatch.setattr("moetune.measure.bench.perf_counter", lambda: planted_time.now_ns() / 1e9)
    backend = InTwoBatches(milliseconds={"default": 1.0, "fast": 0.2, "slow": 600.0, "other": 0.3})
    profile = tune(LAYER, REGIME, backend, tmp_path, isolate=False, device="cpu")
    for choice in profile.choices:
        (rejection,) = [each for each in choice.rejected if each.tactic == tactic("slow")]
        assert rejection.reason.startswith("stopped: one run takes ")
