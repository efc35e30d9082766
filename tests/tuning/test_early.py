"""The processes of a tune start before torch is imported only where it is plain that something will be measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from planted import LAYER, PlantedBackend, tactic
from processes import children
from runs import tune_planted

from moetune.measure.spares import Spares
from moetune.store.store import Store
from moetune.tuning import tune as tune_module
from moetune.tuning.early import start_early
from moetune.tuning.question import Question

IN_TIME = """
import os, sys
import moetune
from moetune.measure.spares import Spares
from moetune.tuning.question import Question

started = []
Spares.start = lambda self, count, backend, **options: started.append((count, "torch" in sys.modules))
def stop(*arguments, **options):
    raise SystemExit(str(started))
Question.of = stop
moetune.tune("qwen3-30b-a3b", moetune.Regime(), "torch", sys.argv[1], device="cpu")
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends for which processes were started before the question was put together."""
    found: list[str] = []
    monkeypatch.setattr(Spares, "start_for", lambda self, backend, device, isolate: found.append(backend.name))
    return found


def early(store: object, backend: object = "planted", layer: object = LAYER, surely: bool = False) -> None:
    with Spares() as spares:
        start_early(spares, layer, backend, store, "cpu", True, surely)


def test_what_is_stored_for_the_layer_and_backend_may_be_the_answer(plant, started, tmp_path: Path) -> None:
    plant(milliseconds={"default": 1.0})
    early(tmp_path)
    assert started == ["planted"]
    tune_planted(store=tmp_path)
    started.clear()
    early(tmp_path)
    early(Store(tmp_path))
    assert started == []
    early(tmp_path, surely=True)
    early(tmp_path, layer=LAYER.model_copy(update={"top_k": 1}))
    early(tmp_path, PlantedBackend({"default": 1.0}, name="other"))
    assert started == ["planted", "planted", "other"]


@pytest.mark.parametrize(
    ("backend", "layer", "store"), [("auto", LAYER, "s"), ("no such", LAYER, "s"), ("torch", "no such", "s")]
)
def test_what_is_not_known_or_wrong_starts_nothing_and_is_no_error_yet(started, backend, layer, store) -> None:
    early(store, backend, layer, surely=True)
    assert started == []


def test_nothing_starts_if_nothing_may_be_measured(plant, started, tmp_path: Path) -> None:
    plant(milliseconds={"default": 1.0})
    with pytest.raises(tune_module.MissError):
        tune_planted(store=tmp_path, frozen=True, isolate=True)
    assert started == []


@pytest.mark.parametrize("again", [False, True])
def test_processes_that_nobody_needs_end_with_the_tune(plant, tmp_path: Path, monkeypatch, again: bool) -> None:
    before, seen = children(), []
    plant(milliseconds={"default": 1.0})

    def failing(cls, *arguments):
        seen.append(len(children() - before))
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Question, "of", classmethod(failing))
        with pytest.raises(KeyboardInterrupt):
            tune_planted(store=tmp_path, isolate=True, again=again)
    assert seen == [1]
    assert children() == before
    profile = tune_planted(store=tmp_path, isolate=True, again=again)
    assert {choice.tactic for choice in profile.choices} == {tactic("default")}
    assert children() == before


def test_they_start_before_torch_is_imported(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", IN_TIME, tmp_path], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[(1, False)]"
