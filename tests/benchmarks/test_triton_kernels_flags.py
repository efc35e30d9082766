"""The benchmark of triton_kernels' flags, on a CPU with a stand-in of the package and a planted time."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import planted_time
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "backends" / "triton_kernels"))

import formula_cells
import kernels_stand_in
import triton_kernels_flags
from common import Journal
from test_kernels_backend import tiny

from moetune.backends.triton_kernels.backend import TritonKernelsBackend
from moetune.backends.triton_kernels.runner import KernelsRunner
from moetune.backends.triton_kernels.space import Flags

LAYER = tiny(num_experts=16, hidden_size=192, intermediate_size=64 + 32)
TINY = replace(triton_kernels_flags.COMPARISON, layer_of=lambda name: LAYER)


@pytest.fixture
def planted(monkeypatch):
    """triton_kernels on a CPU. Each GEMM takes 1 ms with 16 rows and blocks of 64 along K, 3 ms with others."""
    run = KernelsRunner.run

    def timed(self, tactic, draw=0):
        flags = [Flags.parse(tactic[name]) for name in ("gemm1", "gemm2")]
        planted_time.spend(sum(1.0 if (each.block_m, each.block_k) == (16, 64) else 3.0 for each in flags))
        return run(self, tactic, draw)

    kernels_stand_in.plant(monkeypatch)
    monkeypatch.setattr(TritonKernelsBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(KernelsRunner, "run", timed)
    planted_time.install()


def test_every_deployment_can_be_tuned():
    for model, ep in triton_kernels_flags.DEPLOYMENTS:
        for load in formula_cells.COMPARED:
            deployment = formula_cells.Deployment(model, ep, load)
            layer = triton_kernels_flags.COMPARISON.layer_of(model)
            rows = deployment.rows(layer, formula_cells.TOKENS)
            assert deployment.regime(rows.values()).buckets == tuple(rows.values())
            assert TritonKernelsBackend().unsupported(layer, deployment.regime()) is None


def test_a_cell_compares_the_choice_with_the_packages_own(planted, tmp_path):
    journal = Journal(tmp_path / "out.jsonl")
    deployments = [formula_cells.Deployment("tiny", 4, "allgather")]
    assert formula_cells.measure(TINY, journal, deployments, (32,), time.time() + 600, "cpu") == 0
    (line,) = journal.lines
    assert line["rows"] == 32
    # 32 rows of 4 ids on 4 experts are 32 slots an expert by the formula, 8 under this load
    assert line["tactics"]["vllm"] == {"gemm1": "32x128x4x1", "gemm2": "32x128x4x1"}
    assert all(line["tactics"]["choice"][name].startswith("16x64x") for name in ("gemm1", "gemm2"))
    assert line["gain"]["vllm"][0] == pytest.approx(3, abs=0.01)
    text = "\n".join(formula_cells.report(TINY, journal.lines))
    assert "| its own choice for both GEMMs | µs | gain over vLLM |" in text
    gain = f"{line['gain']['vllm'][0]:.3f}"
    assert f"| 32x128x4x1 | {line['us']['choice']:.1f} | {gain} (" in text
    assert f"| all allgather | 1 | {gain}× | 0 |" in text
