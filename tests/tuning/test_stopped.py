"""A tactic that needs far longer than the best so far is stopped, and says so; the default never is."""

import planted_time
import pytest
from planted import LAYER, PlantedBackend, tactic
from runs import REGIME

from moetune.measure.bench import Bench
from moetune.measure.reasons import CrowdedError
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


def test_what_was_not_run_for_lack_of_memory_is_tried_again_by_the_next_tune(limits, tmp_path, monkeypatch):
    """The journal of an interrupted tune has the tactics that failed, but not those that others left no memory."""
    notes = []
    monkeypatch.setattr(
        "moetune.store.journal.Journal.note", lambda self, rows, strategy, rounds, times, failed: notes.append(failed)
    )

    class Crowded(InTwoBatches):
        def prepare(self, problem):
            runner = super().prepare(problem)
            run = runner.run

            def crowded(tactic_, draw):
                if tactic_ == tactic("slow"):
                    raise CrowdedError(60 << 30, 80 << 30, 5)
                if tactic_ == tactic("other"):
                    raise RuntimeError("planted")
                return run(tactic_, draw)

            runner.run = crowded
            return runner

    backend = Crowded(milliseconds={"default": 1.0, "fast": 0.5, "slow": 2.0, "other": 0.6})
    profile = tune(LAYER, REGIME, backend, tmp_path, isolate=False, device="cpu")
    rejected = {each.tactic: each.reason for each in profile.choices[0].rejected}
    assert rejected[tactic("slow")].startswith("not run: tried 5 times, memory was lacking")
    assert [set(failed) for failed in notes if failed] == [{tactic("other")}] * len(profile.choices)
