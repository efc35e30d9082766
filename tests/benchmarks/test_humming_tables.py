"""The benchmark of Humming's configurations, on a CPU with plain torch in Humming's place and a planted time."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import planted_time
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "backends" / "humming"))

import formula_cells
import humming_tables
from common import Journal
from planted_ops import PlantedOps

from moetune.backends.humming import space
from moetune.backends.humming.backend import HummingBackend
from moetune.backends.humming.config import Config
from moetune.backends.humming.runner import HummingRunner
from moetune.spec.layer import MoELayer

LAYER = MoELayer(name="tiny", num_experts=16, top_k=2, hidden_size=128, intermediate_size=64, precision="mxint4")
TINY = replace(humming_tables.COMPARISON, layer_of=lambda name: LAYER)
FAST = "wgmma-16x256x64-16x32x64-s4-b1-producer"
LISTED = (FAST, "mma-8x128x64-8x64x32-s4-b4-streamk")


@pytest.fixture
def planted(monkeypatch):
    """Humming on a CPU. A run takes 1 ms if its first GEMM has the configuration `FAST`, else 2 ms."""
    run = HummingRunner.run

    def timed(self, tactic, draw=0):
        planted_time.spend(1.0 if tactic["gemm1"] == FAST else 2.0)
        return run(self, tactic, draw)

    monkeypatch.setattr(HummingBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(HummingRunner, "run", timed)
    monkeypatch.setattr("moetune.backends.humming.ops.HummingOps", lambda device: PlantedOps())
    monkeypatch.setattr(space, "configs", lambda gemm_type: map(Config.parse, LISTED))
    planted_time.install()


def test_every_deployment_can_be_tuned():
    for model, ep in humming_tables.DEPLOYMENTS:
        for load in formula_cells.COMPARED:
            deployment, layer = formula_cells.Deployment(model, ep, load), humming_tables.layer_of(model)
            regime = deployment.regime(deployment.rows(layer, formula_cells.TOKENS).values())
            assert HummingBackend().unsupported(layer, regime) is None


def test_a_cell_compares_the_choice_with_hummings_heuristic(planted, tmp_path):
    journal, deployment = Journal(tmp_path / "out.jsonl"), formula_cells.Deployment("tiny", 4, "allgather")
    assert formula_cells.measure(TINY, journal, [deployment], (16,), time.time() + 600, "cpu") == 0
    (line,) = journal.lines
    assert line["tactics"]["choice"]["gemm1"] == FAST
    assert line["tactics"]["vllm"] == {"gemm1": "auto", "gemm2": "auto"}
    assert line["gain"]["vllm"][0] == pytest.approx(2, abs=0.01)
    assert "| tiny EP4 allgather | 16 | 16 |" in "\n".join(formula_cells.report(TINY, journal.lines))
