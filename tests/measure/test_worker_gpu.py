"""Real kernels that break the context, hang, exhaust memory, return zeros: each costs itself and nothing else."""

from functools import partial

import pytest
import torch
from processes import children

from moetune.backends.base import Problem
from moetune.measure import worker as worker_module
from moetune.measure.worker import Timeouts, Worker
from moetune.spec.regime import Regime
from moetune.tuning.tune import tune
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

pytestmark = pytest.mark.gpu
planted_kernels = pytest.importorskip("planted_kernels")
LAYER, KernelBackend, tactic = planted_kernels.LAYER, planted_kernels.KernelBackend, planted_kernels.tactic

GOOD, FAST = tactic("default"), tactic("fast")
FIRST_RUN_S = 5
REGIME = Regime(ladder="16", draws=2)


def test_a_tune_survives_tactics_that_no_process_survives(monkeypatch, tmp_path):
    monkeypatch.setattr(worker_module, "Timeouts", partial(Timeouts, first_run_s=FIRST_RUN_S))
    planted = {
        tactic("illegal access"): "illegal memory access",
        tactic("spins"): f"hung: not finished within {FIRST_RUN_S} s",
        tactic("allocates 200 GB"): "out of memory",
        tactic("zeros"): "wrong result",
        tactic("does not compile"): "planted",
    }
    before = children()
    backend = KernelBackend((GOOD, *planted, FAST))
    (choice,) = tune(LAYER, REGIME, backend, tmp_path, device="cuda").choices
    rejected = {rejection.tactic: rejection.reason for rejection in choice.rejected}
    assert rejected.keys() == planted.keys()
    for bad, reason in planted.items():
        assert reason in rejected[bad]
    assert choice.tactic == FAST
    assert 0 < choice.time_us < choice.default_time_us
    assert children() == before


def test_a_tactic_that_fails_only_in_its_graph_is_named_in_a_joint_timing():
    routings = tuple(realize(LAYER, REGIME, 16, draw=draw) for draw in range(2))
    problem = Problem(LAYER, REGIME, 16, REGIME.shard(LAYER), as_draws(routings), "cuda")
    illegal, hung = tactic("illegal access", from_run=2), tactic("spins", from_run=2)
    torch.cuda.synchronize()
    with Worker(KernelBackend(()), "cuda", timeouts=Timeouts(timing_s=2, run_s=0.01)) as worker:
        bench = worker.bench(problem)
        free_bytes, _ = torch.cuda.mem_get_info()
        first, broken, fast, stuck, again = bench.samples([GOOD, illegal, FAST, hung, GOOD], [0, 1, 0, 1])
        assert (broken, stuck) == (None, None)
        assert [len(series) for series in (first, fast, again)] == [4, 4, 4]
        assert max(fast) < min(first + again)
        assert bench.failures.keys() == {illegal, hung}
        assert "illegal memory access" in bench.failures[illegal]
        assert bench.failures[hung].endswith("during its timing")
        assert bench.check(GOOD, 1)
        # the new process has what the old ones had, so those have given it back
        assert torch.cuda.mem_get_info()[0] > free_bytes - 2**29
