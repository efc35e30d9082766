"""Tactics are compiled ahead, in order, each once, by processes that may die and leave nothing behind."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from planted_failures import LAYER, CompilingBackend, FailingBackend, tactic
from processes import GIVE_UP_S, children, eventually, is_running

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.measure import compiling
from moetune.measure.compiling import Compilers, capability_of
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

REGIME = Regime()
HOPPER = (9, 0)
NAMES = [tactic(name) for name in "abcdef"]


@pytest.fixture
def before():
    return children()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def compiled(log: Path) -> list[str]:
    return [line.split("|")[0] for line in log.read_text().splitlines()] if log.exists() else []


def gate(log: Path) -> Path:
    return log.with_name("gate")


def held(log: Path, names: str) -> CompilingBackend:
    """These tactics are not compiled before the gate exists."""
    return CompilingBackend(log=str(log), gate=str(gate(log)), held=names)


@contextmanager
def opened_once_waiting(compilers: Compilers, log: Path):
    """Opens the gate as soon as something is waited for."""

    def open_gate():
        if eventually(lambda: compilers._awaited):
            gate(log).touch()

    thread = threading.Thread(target=open_gate)
    thread.start()
    yield
    thread.join()


def test_requests_are_compiled_once_each_in_order_without_waiting(log, before):
    with Compilers(held(log, "a"), HOPPER, processes=1) as compilers:
        compilers.request(LAYER, REGIME, 4, NAMES[:3])
        compilers.request(LAYER, REGIME, 8, NAMES[1:4])
        gate(log).touch()
        assert compilers.wait(LAYER, REGIME, 8, NAMES[:4]) == {}
        assert compiled(log) == ["a", "b", "c", "d"]
    assert children() == before
    first = log.read_text().splitlines()[0].split("|")
    assert first[1:4] == ["4", "(9, 0)", str(min(19, os.nice(0) + 10))]  # niceness, above this process's own
    assert first[4] == "''"  # no GPU is visible


def test_what_is_waited_for_comes_first(log):
    with Compilers(held(log, "a"), HOPPER, processes=1) as compilers:
        compilers.request(LAYER, REGIME, 4, NAMES[:5])
        assert eventually(lambda: compiled(log) == ["a"])
        with opened_once_waiting(compilers, log):
            assert compilers.wait(LAYER, REGIME, 4, [NAMES[5], NAMES[3]]) == {}
        assert compiled(log)[:3] == ["a", "f", "d"]
        compilers.wait(LAYER, REGIME, 4, NAMES)
        assert sorted(compiled(log)) == list("abcdef")


def test_what_is_likely_next_comes_after_what_is_waited_for_and_before_all_others(log):
    with Compilers(held(log, "a"), HOPPER, processes=1) as compilers:
        compilers.request(LAYER, REGIME, 4, NAMES[:4])
        assert eventually(lambda: compiled(log) == ["a"])
        with opened_once_waiting(compilers, log):
            assert compilers.wait(LAYER, REGIME, 4, [NAMES[2]], likely_next=[NAMES[5], NAMES[3]]) == {}
        assert eventually(lambda: len(compiled(log)) == 5)
        assert compiled(log) == ["a", "c", "f", "d", "b"]


def test_the_parts_of_a_tactic_are_compiled_side_by_side_each_once(log):
    with Compilers(CompilingBackend(log=str(log), together=2, parts=2), HOPPER, processes=2) as compilers:
        assert compilers.wait(LAYER, REGIME, 4, NAMES[:2]) == {}
        compilers.wait(LAYER, REGIME, 8, NAMES[:2])
        lines = [line.split("|") for line in log.read_text().splitlines()]
    assert sorted((line[0], line[6]) for line in lines) == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    assert len({line[5] for line in lines}) == 2


def test_a_tactic_with_a_part_that_does_not_compile_fails_with_the_first_such_reason(log):
    backend = CompilingBackend(log=str(log), parts=3, bad_parts={1: "raises", 2: "exits"})
    with Compilers(backend, HOPPER, processes=2) as compilers:
        failed = compilers.wait(LAYER, REGIME, 4, NAMES[:2])
    assert failed == dict.fromkeys(NAMES[:2], "RuntimeError: planted failure")


def test_a_process_is_kept_free_for_what_is_waited_for(log):
    with Compilers(held(log, "abcde"), HOPPER, processes=3) as compilers:
        compilers.request(LAYER, REGIME, 4, NAMES[:5])
        assert eventually(lambda: set(compiled(log)) == {"a", "b"})
        compilers.wait(LAYER, REGIME, 4, [NAMES[5]])
        assert sorted(compiled(log)) == ["a", "b", "f"]


def test_each_failure_costs_that_tactic_alone_and_is_named(log, before, monkeypatch):
    monkeypatch.setattr(compiling, "NICENESS", 0)  # on a busy machine one of a high niceness could miss the time-out
    bad = {
        tactic("raises"): "RuntimeError: planted failure",
        tactic("segfaults"): "killed by SIGSEGV, twice",
        tactic("spins"): "hung: not compiled within 4 s",
        tactic("exits"): "the process exited with status 3: free(): invalid pointer, twice",
    }
    with Compilers(CompilingBackend(log=str(log)), HOPPER, processes=2, timeout_s=4) as compilers:
        assert compilers.wait(LAYER, REGIME, 4, [NAMES[0], *bad, NAMES[1]]) == bad
        assert compilers.wait(LAYER, REGIME, 4, [tactic("raises"), NAMES[0]]) == {
            tactic("raises"): "RuntimeError: planted failure"
        }
        assert len(children() - before) <= 2
    assert children() == before
    assert {"a", "b"} <= set(compiled(log))


def test_a_process_that_dies_idle_costs_no_tactic(log, before):
    with Compilers(CompilingBackend(log=str(log)), HOPPER, processes=1) as compilers:
        assert compilers.wait(LAYER, REGIME, 4, NAMES[:1]) == {}
        (idle,) = children() - before
        os.kill(idle, signal.SIGKILL)
        assert eventually(lambda: not is_running(idle))
        assert compilers.wait(LAYER, REGIME, 4, NAMES[1:3]) == {}
        assert compiled(log) == ["a", "b", "c"]
    assert children() == before


def test_a_process_that_is_killed_from_outside_as_it_compiles_costs_no_tactic(log, before):
    with Compilers(held(log, "a"), HOPPER, processes=1) as compilers:
        compilers.request(LAYER, REGIME, 4, NAMES[:3])
        assert eventually(lambda: compiled(log) == ["a"])
        (compiling_a,) = children() - before
        os.kill(compiling_a, signal.SIGKILL)
        assert eventually(lambda: compiled(log) == ["a", "a"])
        gate(log).touch()
        assert compilers.wait(LAYER, REGIME, 4, NAMES[:3]) == {}
    assert compiled(log) == ["a", "a", "b", "c"]
    assert children() == before


def test_a_job_during_which_a_process_died_runs_alone_in_a_new_process(log, before):
    alone = tactic("segfaults")
    with Compilers(CompilingBackend(log=str(log)), HOPPER, processes=3) as compilers:
        assert compilers.wait(LAYER, REGIME, 4, NAMES[:3]) == {}
        assert compilers.wait(LAYER, REGIME, 4, [alone, *NAMES]) == {alone: "killed by SIGSEGV, twice"}
        assert len(children() - before) <= 3
    lines = [line.split("|") for line in log.read_text().splitlines()]
    _, second = (at for at, line in enumerate(lines) if line[0] == "segfaults")
    assert lines[second][5] not in {line[5] for line in lines[:second]}
    assert children() == before


def test_processes_that_cannot_start_cost_the_tactics_that_wait_for_them(log, monkeypatch):
    monkeypatch.setattr(compiling, "_serve", Path)  # takes a channel and a backend for a path, and raises
    with Compilers(CompilingBackend(log=str(log)), HOPPER, processes=1) as compilers:
        failed = compilers.wait(LAYER, REGIME, 4, NAMES[:2])
    assert failed.keys() == set(NAMES[:2])
    assert all("status 1: TypeError" in reason for reason in failed.values())


def test_several_processes_share_the_work(log):
    with Compilers(CompilingBackend(log=str(log), together=3), HOPPER, processes=3) as compilers:
        compilers.wait(LAYER, REGIME, 4, NAMES)
    assert len({line.split("|")[5] for line in log.read_text().splitlines()}) == 3


def test_closing_kills_what_still_compiles_at_once(log, before):
    with Compilers(CompilingBackend(log=str(log)), HOPPER, processes=2, timeout_s=GIVE_UP_S) as compilers:
        compilers.request(LAYER, REGIME, 4, [tactic("spins"), tactic("spins", from_run=2), *NAMES])
        assert eventually(lambda: compiled(log) == ["spins", "spins"])
        start = time.monotonic()
    assert time.monotonic() - start < GIVE_UP_S / 2
    assert children() == before
    assert compiled(log) == ["spins", "spins"]


@pytest.mark.parametrize(
    ("backend", "capability"), [(FailingBackend(), HOPPER), (CompilingBackend(log="/nowhere/log"), None)]
)
def test_where_there_is_nothing_to_compile_no_process_starts(backend, capability, before):
    with Compilers(backend, capability) as compilers:
        compilers.request(LAYER, REGIME, 4, NAMES)
        assert compilers.wait(LAYER, REGIME, 4, NAMES) == {}
        assert children() == before


def test_a_cpu_has_no_compute_capability():
    assert capability_of("cpu") is None


MODEL = MoELayer(num_experts=16, top_k=4, hidden_size=128, intermediate_size=128, precision="bf16")
CONFIG = Tactic(BLOCK_SIZE_M=16, BLOCK_SIZE_N=64, BLOCK_SIZE_K=64, GROUP_SIZE_M=1, num_warps=4, num_stages=2)


def keys(backend, regime, rows):
    return [tuple(backend.compile_keys(MODEL, regime, each, CONFIG)) for each in rows]


def test_the_builtin_triton_kernel_is_compiled_once_for_all_rows():
    shared = Regime(ep_size=4, dispatch="allgather")
    assert len(set(keys(TritonBackend(), shared, [1, 3, 16, 8192]))) == 1
    assert len(set(keys(TritonBackend(), Regime(), [1, 2, 16, 8192]))) == 2  # 4·M·k ≤ E: not sorted
    assert keys(TritonBackend(), shared, [16]) != keys(TritonBackend(), Regime(ep_size=4, layout="slot"), [16])
    assert len(set(keys(TritonBackend("vllm"), shared, [1, 3, 16]))) == 3


def test_triton_compiles_ahead_into_its_cache_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bad = Tactic({**CONFIG, "BLOCK_SIZE_N": 48})
    regime = Regime(ep_size=4, dispatch="allgather")
    with Compilers(TritonBackend(), HOPPER, processes=1) as compilers:
        failed = compilers.wait(MODEL, regime, 64, [CONFIG, bad])
        assert failed.keys() == {bad}
        assert len(list(tmp_path.rglob("grouped_gemm_kernel.cubin"))) == 2  # of two GEMMs
        assert compilers.wait(MODEL, regime, 1024, [CONFIG]) == {}
        assert len(list(tmp_path.rglob("grouped_gemm_kernel.cubin"))) == 2
