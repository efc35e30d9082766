"""Processes that are started ahead import what they will need, serve once they are asked, and leave nothing behind."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from planted_failures import LAYER, CompilingBackend, FailingBackend, problem, tactic
from processes import children, eventually, is_running

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.measure import spares as module
from moetune.measure.compiling import NICENESS, NO_GPU, Compilers
from moetune.measure.spares import Spares
from moetune.measure.worker import open_benches
from moetune.spec.regime import Regime

GOOD = tactic("default")


@dataclass
class LoadingBackend(FailingBackend):
    """Each process that loads its modules writes a file that is named by its pid."""

    def load(self):
        Path(self.folder, str(os.getpid())).touch()


def loaded(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir()}


@pytest.fixture
def before():
    return children()


def test_a_worker_takes_the_process_that_was_started_ahead(tmp_path, before):
    backend = LoadingBackend(folder=str(tmp_path))
    with Spares() as spares:
        spares.start(1, backend)
        (spare,) = children() - before
        assert eventually(lambda: loaded(tmp_path) == {spare})
        with open_benches(backend, "cpu", True, spares.child) as bench_of:
            assert len(spares) == 0
            assert bench_of(problem()).check(GOOD, 0)
            assert children() - before == {spare}
        assert children() == before


def test_compilers_take_the_processes_of_their_kind_and_start_more(tmp_path, before):
    log = tmp_path / "log"
    backend = CompilingBackend(log=str(log), together=3)
    names = [tactic(name) for name in "abc"]
    with Spares() as spares:
        spares.start(1, backend)
        spares.start(2, backend, environment=NO_GPU, niceness=NICENESS)
        ahead = children() - before
        with Compilers(backend, (9, 0), processes=3, child=spares.child) as compilers:
            assert compilers.wait(LAYER, Regime(), 4, names) == {}
            assert len(spares) == 1
        lines = [line.split("|") for line in log.read_text().splitlines()]
        assert {(line[3], line[4]) for line in lines} == {(str(min(19, os.nice(0) + NICENESS)), "''")}
        assert len({int(line[5]) for line in lines} & ahead) == 2
    assert children() == before


def test_a_spare_that_is_dead_is_replaced(tmp_path, before):
    backend = LoadingBackend(folder=str(tmp_path))
    with Spares() as spares:
        spares.start(1, backend)
        (spare,) = children() - before
        os.kill(spare, signal.SIGKILL)
        assert eventually(lambda: not is_running(spare))
        with open_benches(backend, "cpu", True, spares.child) as bench_of:
            assert bench_of(problem()).check(GOOD, 0)
            assert spare not in children()
    assert children() == before


def test_a_spare_that_dies_as_it_is_taken_costs_a_retry(tmp_path, before, monkeypatch):
    backend = LoadingBackend(folder=str(tmp_path))
    with Spares() as spares:
        spares.start(1, backend)
        (spare,) = children() - before
        os.kill(spare, signal.SIGKILL)
        monkeypatch.setattr(module.Child, "has_ended", property(lambda child: child._process.poll() is not None))
        assert eventually(lambda: not is_running(spare))
        with monkeypatch.context() as unseen:
            unseen.setattr(module.Child, "has_ended", False)
            opened = open_benches(backend, "cpu", True, spares.child)
            bench_of = opened.__enter__()
        try:
            assert bench_of(problem()).check(GOOD, 0)
        finally:
            opened.__exit__(None, None, None)
    assert children() == before


def test_what_cannot_be_sent_kills_the_spare(before):
    with Spares() as spares:
        spares.start(1, FailingBackend())
        with pytest.raises((AttributeError, TypeError), match="pickle"):
            spares.child(lambda channel: None)
        assert children() == before


def test_a_tune_has_a_worker_and_on_a_gpu_compilers_of_a_backend_that_compiles(monkeypatch):
    started = []
    monkeypatch.setattr(Spares, "start", lambda self, count, backend, **options: started.append((count, options)))
    monkeypatch.setattr(module, "most_processes", lambda: 16)
    compilers = (11, {"environment": NO_GPU, "niceness": NICENESS})
    for has_gpu in (False, True):
        monkeypatch.setattr(module, "has_gpu", lambda has_gpu=has_gpu: has_gpu)
        for backend, device, isolate, wanted in (
            (TritonBackend(), "cpu", True, [(1, {})]),
            (TritonBackend(), "cuda:1", True, [(1, {}), compilers]),
            (TritonBackend(), "cuda", False, [compilers]),
            (TritonBackend(), None, True, [(1, {}), compilers] if has_gpu else [(1, {})]),
            (FailingBackend(), "cuda", True, [(1, {})]),
            (FailingBackend(), "cuda", False, []),
        ):
            started.clear()
            Spares().start_for(backend, device, isolate)
            assert started == wanted


def test_what_is_started_already_is_not_started_again(before):
    with Spares() as spares:
        spares.start_for(FailingBackend(), "cpu", True)
        spares.start_for(FailingBackend(), "cpu", True)
        assert len(spares) == len(children() - before) == 1
    assert children() == before
