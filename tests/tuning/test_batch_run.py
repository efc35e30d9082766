"""Questions are answered in this process, or by one process for each device. A failure costs its own question."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from planted import LAYER, PlantedBackend
from processes import children, eventually, is_running

from moetune.recordings.recording import Recording
from moetune.spec.regime import Regime
from moetune.store.store import Store
from moetune.tuning import batch_run
from moetune.tuning import final_comparison as final
from moetune.tuning.batch_run import Task, devices_for, run
from moetune.tuning.events import BucketChosen, Served, TacticMeasured

GIVEN = {"ep_size": 2, "attention_dp": True, "dispatch": "allgather", "ladder": "4,8", "draws": 1}
FAST = {"default": 1.0, "fast": 0.5}


@dataclass
class DyingBackend(PlantedBackend):
    """Ends its process when a problem is prepared, until the file `until` exists, which it writes before."""

    until: Path = Path()

    def prepare(self, problem):
        if not self.until.exists():
            self.until.touch()
            os._exit(7)
        return super().prepare(problem)


@dataclass
class AlwaysDyingBackend(PlantedBackend):
    def prepare(self, problem):
        os._exit(7)


@dataclass
class SeenBackend(PlantedBackend):
    """Writes into `folder` which GPUs its process sees."""

    folder: Path = Path()

    def prepare(self, problem):
        (self.folder / str(os.getpid())).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        return super().prepare(problem)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(final, "SECONDS", 0.05)


@pytest.fixture
def answers(tmp_path):
    """Runs one question for each backend, and returns the answers, the starts and the events."""

    def _answers(*backends, devices=("cpu",), recording=None):
        store = Store(tmp_path / "store", packaged=tmp_path / "none")
        tasks = [
            Task(number, LAYER, Regime(**GIVEN, seed=number), each, store, isolate=False)
            for number, each in enumerate(backends, 1)
        ]  # fmt: skip
        if recording:
            replay = Regime(**GIVEN, distribution=f"replay:{recording.digest}")
            tasks[-1] = replace(tasks[-1], regime=replay, recording=recording)
        found, starts, events = {}, [], []
        run(
            tasks,
            devices,
            lambda number, event: events.append((number, event)),
            lambda number, device: starts.append((number, device)),
            lambda answer: found.update({answer.number: answer}),
        )
        return found, starts, events

    return _answers


def test_a_question_that_fails_leaves_the_others(answers):
    found, starts, events = answers(
        PlantedBackend(FAST), PlantedBackend(FAST, wrong=frozenset({"default"})), PlantedBackend(FAST)
    )
    assert starts == [(1, "cpu"), (2, "cpu"), (3, "cpu")]
    assert "default tactic" in found[2].failed
    assert found[2].profile is None
    for number in (1, 3):
        assert (found[number].tuned, found[number].failed) == (2, "")
        assert [choice.tactic["algorithm"] for choice in found[number].profile.choices] == ["fast", "fast"]
        assert Path(found[number].path).exists()
        assert sum(isinstance(event, BucketChosen) for of, event in events if of == number) == 2
    assert not [event for _, event in events if isinstance(event, TacticMeasured)]


def test_what_is_stored_is_not_measured_again(answers):
    answers(PlantedBackend(FAST))
    backend = PlantedBackend(FAST)
    found, _, events = answers(backend)
    assert not backend.prepared
    assert found[1].tuned == 0
    assert [type(event) for _, event in events] == [Served]
    assert found[1].path == str(events[0][1].path)


def test_an_unexpected_error_is_a_failure_with_its_reason(answers, monkeypatch):
    backend = PlantedBackend(FAST)
    monkeypatch.setattr(backend, "candidates", lambda *_: {}["none"])
    found, _, _ = answers(backend, PlantedBackend(FAST))
    assert "KeyError" in found[1].failed
    assert not found[2].failed


def test_an_interrupt_ends_the_batch(answers, monkeypatch):
    backend = PlantedBackend(FAST)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "prepare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        answers(backend, PlantedBackend(FAST))


def test_an_interrupt_ends_the_processes_of_all_devices(tmp_path):
    before = children()
    tasks = [Task(number, LAYER, Regime(**GIVEN), PlantedBackend(FAST), Store(tmp_path)) for number in (1, 2)]

    def interrupt(number, device):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tasks, ("cpu", "cpu"), lambda number, event: None, interrupt, lambda answer: None)
    assert eventually(lambda: not {pid for pid in children() - before if is_running(pid)})


@pytest.mark.slow
def test_each_gpu_has_a_process_that_sees_it_alone(answers, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    monkeypatch.setattr(batch_run, "_serve", _serve_on_cpu)
    seen = tmp_path / "seen"
    seen.mkdir()
    dies_once = DyingBackend(FAST, until=tmp_path / "died")
    always = AlwaysDyingBackend(FAST)
    before = children()
    found, starts, events = answers(
        SeenBackend(FAST, folder=seen), dies_once, always, SeenBackend(FAST, folder=seen),
        devices=("cuda:0", "cuda:1"), recording=RECORDING,
    )  # fmt: skip
    assert [found[number].tuned for number in (1, 2, 4)] == [2, 2, 2]
    assert "Its process ended 2 times" in found[3].failed
    assert {number: sum(one == number for one, _ in starts) for number in (1, 2, 3, 4)} == {1: 1, 2: 2, 3: 2, 4: 1}
    assert {device for _, device in starts} == {"cuda:0", "cuda:1"}
    assert {path.read_text() for path in seen.iterdir()} <= {"GPU-a", "GPU-b"}
    assert sum(isinstance(event, BucketChosen) for of, event in events if of == 4) == 2
    assert eventually(lambda: not {pid for pid in children() - before if is_running(pid)})


RECORDING = Recording(
    digest="0123456789abcdef",
    name="traffic.npy",
    spelled="replay:traffic.npy",
    ids=torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]], dtype=torch.int32),
    weights=None,
    loads=(1,) * 8,
    layers=1,
    layer=None,
)
"""It is not read in the processes of the devices."""


def _serve_on_cpu(channel, device):
    """A process of a batch on a machine without a GPU."""
    assert device == "cuda"
    REAL_SERVE(channel, "cpu")


REAL_SERVE = batch_run._serve


def test_the_gpus_are_those_like_the_first(monkeypatch):
    names = ["H200", "H100", "H200"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert devices_for(None) == ("cuda:0", "cuda:2")
    assert devices_for("cuda:1") == ("cuda:1",)
    assert devices_for("cpu") == ("cpu",)


def test_the_visible_gpus_are_counted_as_torch_counts_them(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert batch_run._environment("2") == {"CUDA_VISIBLE_DEVICES": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert batch_run._environment("2") == {"CUDA_VISIBLE_DEVICES": "7"}
