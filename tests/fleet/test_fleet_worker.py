"""What runs on each GPU: it says what it is, tunes what it is handed, and writes no store."""

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from planted import LAYER, PlantedBackend
from planted_cluster import regime

from moetune import __version__
from moetune.errors import UnsupportedError
from moetune.fleet.cluster import Ended, Order
from moetune.fleet.ray_cluster import undo_threads
from moetune.fleet.worker import FleetWorker
from moetune.measure.probe import environment
from moetune.recordings.recording import Recording, known
from moetune.spec.environment import Environment
from moetune.store.profile import Choice, Profile
from moetune.tuning import final_comparison
from moetune.tuning.events import BucketFailed


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(final_comparison, "SECONDS", 0.02)


def order(backend, rows, ladder="4,8", adds=False):
    asked = regime(ladder)
    here = environment(backend, "cpu")
    nothing = Profile(layer=LAYER, regime=asked, backend=backend.name, environment=here, choices=())
    return Order(LAYER, asked, backend, here.digest, rows, nothing, adds, None, isolate=False)


def test_it_says_in_which_environment_each_backend_measures():
    class Missing(PlantedBackend):
        def unavailable(self):
            return "no GPU", "Buy one."

    class Broken(PlantedBackend):
        def environment(self):
            raise ImportError("libplanted.so is missing")

    class Refusing(PlantedBackend):
        def unavailable(self):
            raise UnsupportedError("An old GPU.")

    given = {"default": 1.0}
    said = FleetWorker().describe([PlantedBackend(given), Missing(given), Broken(given), Refusing(given)])
    good, *others = said.environments
    assert isinstance(good, Environment)
    assert good.digest == environment(PlantedBackend(given), "cpu").digest
    assert others[0] == "no GPU"
    assert others[1] == "Backend planted cannot run here: libplanted.so is missing."
    assert others[2] == "An old GPU."
    assert (said.pid, said.device, said.version) == (os.getpid(), "cpu", __version__)


def test_each_choice_is_reported_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    reports = list(FleetWorker().tune(order(PlantedBackend({"default": 1.0, "fast": 0.5}), (4, 8))))
    assert [(each.rows, each.tactic["algorithm"]) for each in reports[:-1]] == [(4, "fast"), (8, "fast")]
    assert reports[-1] == Ended()
    assert not list(tmp_path.rglob("*"))


def test_a_default_that_fails_is_reported_with_the_reason():
    reports = list(FleetWorker().tune(order(PlantedBackend({"default": 1.0}, wrong=frozenset({"default"})), (4,))))
    assert isinstance(reports[0], BucketFailed)
    assert reports[1].failed.startswith("The default tactic")


def test_an_error_of_a_package_is_a_failure_with_its_reason(monkeypatch):
    backend = PlantedBackend({"default": 1.0})
    monkeypatch.setattr(backend, "candidates", lambda *_: {}["none"])
    (report,) = FleetWorker().tune(order(backend, (4,)))
    assert "KeyError" in report.failed


def test_nothing_is_measured_in_another_environment_than_the_choices_are_stored_under():
    backend = PlantedBackend({"default": 1.0})
    (report,) = FleetWorker().tune(replace(order(backend, (4,)), environment="0123456789abcdef"))
    assert "environment is not the one" in report.failed
    assert not backend.prepared


def test_buckets_are_added_only_if_the_order_says_so():
    """At 64 rows and more another tactic is the fastest, so the ladder `adaptive` adds buckets around 64."""
    backend = PlantedBackend(
        {"default": 3.0, "small": 1.0, "large": 2.0}, milliseconds_from={("small", 64): 2.0, ("large", 64): 1.0}
    )
    rows = (32, 128)
    alone = [each.rows for each in FleetWorker().tune(order(backend, rows, "adaptive")) if isinstance(each, Choice)]
    assert alone == [32, 128]
    added = [
        each.rows
        for each in FleetWorker().tune(order(backend, rows, "adaptive", adds=True))
        if isinstance(each, Choice)
    ]
    assert set(rows) < set(added)
    assert any(lower < 64 <= upper and upper <= 1.3 * lower for lower, upper in pairwise(sorted(added)))


def test_a_recording_comes_with_the_order():
    recording = Recording(
        digest="fedcba9876543210", name="traffic.npy", spelled="replay:traffic.npy",
        ids=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), weights=None, loads=(1,) * 4, layers=1, layer=None,
    )  # fmt: skip
    asked = regime("4").model_copy(update={"distribution": f"replay:{recording.digest}"})
    list(FleetWorker().tune(replace(order(PlantedBackend({"default": 1.0}), (4,)), recording=recording)))
    assert known(type(asked)(**asked.model_dump())) is recording


@pytest.mark.parametrize(("started_with", "left"), [(b"A=1\0OMP_NUM_THREADS=1\0", "1"), (b"A=1\0", None)])
def test_the_number_of_threads_that_ray_sets_is_undone(tmp_path, monkeypatch, started_with, left):
    (tmp_path / "environ").write_bytes(started_with)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    undo_threads(tmp_path / "environ")
    assert os.environ.get("OMP_NUM_THREADS") == left
