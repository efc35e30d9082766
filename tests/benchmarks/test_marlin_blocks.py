"""The benchmark of Marlin's block sizes, on a CPU with planted ops and a planted time."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import planted_time
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "backends" / "marlin"))

import formula_cells
import marlin_blocks
import marlin_ops
from common import Journal
from test_marlin_backend import activate_on_cpu

from moetune.backends.marlin import runner
from moetune.backends.marlin.backend import MarlinBackend
from moetune.backends.marlin.runner import MarlinRunner
from moetune.errors import NoResultError
from moetune.spec.layer import MoELayer
from moetune.tuning import final_comparison

LAYER = MoELayer(name="tiny", num_experts=16, top_k=2, hidden_size=128, intermediate_size=64, precision="mxint4")
DEPLOYMENTS = [formula_cells.Deployment("tiny", 4, load) for load in formula_cells.COMPARED]
TOKENS = (4, 64)
TINY = replace(marlin_blocks.COMPARISON, layer_of=lambda name: LAYER)


@pytest.fixture
def planted(monkeypatch):
    """vLLM's ops on a CPU, and short comparisons. A run takes 1 ms with blocks of 16 rows, 3 ms with others."""
    run = MarlinRunner.run

    def timed(self, tactic, draw=0):
        planted_time.spend(1.0 if tactic["block_size_m"] == 16 else 3.0)
        return run(self, tactic, draw)

    monkeypatch.setattr(MarlinBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(MarlinRunner, "run", timed)
    monkeypatch.setattr(runner, "activate", lambda activation, *buffers: partial(activate_on_cpu, activation)(*buffers))
    monkeypatch.setattr(formula_cells, "ROUNDS", (1, 2))
    monkeypatch.setattr(final_comparison, "SECONDS", 0.05)
    planted_time.install()
    with marlin_ops.defined():
        yield


def test_every_deployment_can_be_tuned():
    for model, ep in marlin_blocks.DEPLOYMENTS:
        for load in formula_cells.COMPARED:
            deployment = formula_cells.Deployment(model, ep, load)
            layer = marlin_blocks.layer_of(model)
            rows = deployment.rows(layer, formula_cells.TOKENS)
            assert deployment.regime(rows.values()).buckets == tuple(rows.values())
            assert MarlinBackend().unsupported(layer, deployment.regime()) is None


def test_rows_are_those_of_the_tokens_of_all_ranks():
    assert DEPLOYMENTS[0].rows(LAYER, TOKENS) == {4: 4, 64: 64}
    assert DEPLOYMENTS[1].rows(LAYER, TOKENS) == {4: 2, 64: 29}  # 1 − C(12,2)/C(16,2) = 0.45 of them
    assert DEPLOYMENTS[0].regime([64, 4, 4]).buckets == (4, 64)


def test_cells_are_measured_once_and_reported(planted, tmp_path, capsys):
    journal = Journal(tmp_path / "out.jsonl")
    assert formula_cells.measure(TINY, journal, DEPLOYMENTS, (64,), time.time() + 600, "cpu") == 0
    assert len(journal.lines) == 2
    line = journal.find(load="allgather", tokens=64)
    assert (line["rows"], line["tactics"]["choice"]["block_size_m"]) == (64, 16)
    # 64 · 2 slots on 4 experts: 8 an expert if all ranks share them, 32 as SGLang counts
    assert [line["tactics"][each]["block_size_m"] for each in ("vllm", "sglang")] == [16, 48]
    assert line["gain"]["vllm"][0] == pytest.approx(1, abs=0.01)
    assert line["gain"]["sglang"][0] == pytest.approx(3, abs=0.01)
    before = (tmp_path / "out.jsonl").read_text()
    assert formula_cells.measure(TINY, Journal(tmp_path / "out.jsonl"), DEPLOYMENTS, (64,), 0.0, "cpu") == 0
    assert (tmp_path / "out.jsonl").read_text() == before
    capsys.readouterr()
    text = "\n".join(formula_cells.report(TINY, journal.lines))
    assert "| tiny EP4 allgather | 64 | 64 |" in text
    assert "| all allgather | 1 |" in text


@pytest.mark.parametrize(("device", "isolated"), [("cuda", True), ("cuda:1", True), ("cpu", False)])
def test_on_a_gpu_the_tune_runs_in_a_worker(device, isolated, monkeypatch, tmp_path):
    given = {}

    def tune(*_, **named):
        given.update(named)
        return SimpleNamespace(choices=[SimpleNamespace(rows=4, tactic="best")])

    monkeypatch.setattr(formula_cells.moetune, "tune", tune)
    found = formula_cells.tuned(DEPLOYMENTS[0], LAYER, MarlinBackend(), [4], tmp_path, time.time() + 600, device)
    assert found == {4: "best"}
    assert (given["device"], given["isolate"]) == (device, isolated)


def test_a_deployment_that_fails_ends_no_other(planted, tmp_path, monkeypatch, capsys):
    tuned = formula_cells.tuned

    def fails_once(deployment, *given):
        if deployment == DEPLOYMENTS[0]:
            raise NoResultError("No tactic ran.", "Use another one.")
        return tuned(deployment, *given)

    monkeypatch.setattr(formula_cells, "tuned", fails_once)
    journal = Journal(tmp_path / "out.jsonl")
    assert formula_cells.measure(TINY, journal, DEPLOYMENTS, (4,), time.time() + 600, "cpu") == 1
    assert [line["load"] for line in journal.lines] == ["deduplicated"]
    assert "tiny EP4 allgather: No tactic ran. Use another one." in capsys.readouterr().out


@pytest.mark.parametrize("left", [0, 3])
def test_the_exit_code_says_whether_cells_are_left(left, monkeypatch, tmp_path, capsys):
    """A script that begins a job again only after a failure would take a cut one for done."""
    monkeypatch.setattr(sys, "argv", ["marlin_blocks.py", "measure", str(tmp_path / "out.jsonl")])
    monkeypatch.setattr(formula_cells, "measure", lambda *given: left)
    with pytest.raises(SystemExit, match="1") if left else nullcontext():
        formula_cells.run(marlin_blocks.COMPARISON, marlin_blocks.DEPLOYMENTS, "")
    assert f"{left} cells are left" in capsys.readouterr().out


def test_when_the_time_is_up_the_rest_is_left(planted, tmp_path):
    journal = Journal(tmp_path / "out.jsonl")
    assert formula_cells.measure(TINY, journal, DEPLOYMENTS, TOKENS, 0.0, "cpu") == 4
    assert journal.lines == []


def test_the_report_counts_slower_cells_and_takes_geometric_means():
    def line(load, vllm, sglang):
        return {
            "model": "tiny", "ep": 4, "load": load, "tokens": 4, "rows": 4, "device": "NVIDIA X",
            "tactics": {name: {"block_size_m": 8} for name in ("choice", "vllm", "sglang")},
            "us": {"choice": 9.0}, "gain": {"vllm": [vllm, 0.9, 1.5], "sglang": [sglang, 0.9, 1.5]},
        }  # fmt: skip

    lines = [line("allgather", 1.0, 1.21), line("allgather", 0.98, 1.0)]
    summary = list(formula_cells.report(TINY, json.loads(json.dumps(lines))))[-1]
    assert summary == "| all allgather | 2 | 0.990× | 1.100× | 1 | 0 |"
    assert list(formula_cells.report(TINY, [])) == ["No cells."]
