"""The benchmark of vLLM's flags for fp8 blocks, on a CPU with planted backends and a planted time."""

import sys
import time
from pathlib import Path

import pytest
from planted import LAYER, PlantedBackend

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rivals
from common import Journal

from moetune.backends import registry
from moetune.backends.registry import Diagnosis
from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.tuning import final_comparison as final
from moetune.tuning import side_by_side, tune_all
from moetune.tuning.flag_answer import decode_rows

DEPLOYMENTS = [rivals.Deployment("tiny", 2, "allgather")]
TOKENS = (4, 2048)
SOME = time.time() + 1e6
CROSSING = {("default", 2048): 9.0}


@pytest.fixture
def planted(monkeypatch):
    """Triton is the fastest at 4 rows, and FlashInfer's fp8 blocks at 2048. DeepGEMM cannot run."""
    rival = PlantedBackend({"default": 3.0}, name="flashinfer-fp8-block")
    rival.rival = True
    backends = {
        "triton": PlantedBackend({"default": 2.0, "best": 1.0}, name="triton",
                                 milliseconds_at=CROSSING | {("best", 2048): 9.0}),
        "flashinfer-fp8-block": rival,
    }  # fmt: skip
    absent = {"deep-gemm": PlantedBackend({"default": 1.0}, name="deep-gemm")}
    monkeypatch.setattr(registry, "backends", lambda: (*backends, *absent))
    monkeypatch.setattr(registry, "backend", {**backends, **absent}.__getitem__)
    monkeypatch.setattr(registry, "diagnosis", lambda name: Diagnosis(name, name in backends, "vLLM is not installed"))
    monkeypatch.setattr(rivals, "layer_of", lambda name: LAYER.model_copy(update={"precision": Precision.FP8_BLOCK}))
    monkeypatch.setattr(tune_all, "HOPPER", None)  # the planted machine has no compute capability
    monkeypatch.setattr(final, "SECONDS", 0.05)
    monkeypatch.setattr(side_by_side, "SECONDS", 0.05)


def measured(tmp_path, end=SOME):
    journal = Journal(tmp_path / "rivals.jsonl")
    return rivals.measure(journal, DEPLOYMENTS, TOKENS, end, "cpu", isolate=False), journal


def test_every_deployment_has_buckets_of_decode_and_of_prefill_and_the_rivals_compute_it():
    for model, ep in rivals.DEPLOYMENTS:
        layer = rivals.layer_of(model)
        assert layer.precision == "fp8_block"
        for load in rivals.COMPARED:
            regime = rivals.Deployment(model, ep, load).regime(layer, rivals.TOKENS)
            assert len(regime.buckets) == len(rivals.TOKENS)
            assert registry.rivals_computing(layer, regime) == ["flashinfer-fp8-block", "deep-gemm"]
            assert "triton" in registry.backends_computing(layer, regime)
            assert regime.buckets[0] <= decode_rows(layer, regime) < regime.buckets[-1]


def test_rows_are_those_of_the_tokens_of_all_ranks():
    layer = preset("deepseek-r1")
    assert rivals.Deployment("deepseek-r1", 8, "allgather").regime(layer, (16, 64)).buckets == (16, 64)
    deduplicated = rivals.Deployment("deepseek-r1", 8, "deduplicated").regime(layer, (16, 64)).buckets
    assert 0.4 < deduplicated[1] / 64 < 0.6  # group-limited routing brings half of the tokens to a rank


def test_a_measured_deployment_is_kept_and_reported_with_flags_by_rows(planted, tmp_path):
    left, journal = measured(tmp_path)
    assert (left, len(journal.lines)) == (0, 1)
    text = "\n".join(rivals.report(journal.lines))
    small, large = (line for line in text.splitlines() if line.startswith(("| 4 |", "| 2048 |")))
    assert "| decode |" in small
    assert "| triton |" in small
    assert "| prefill |" in large
    assert "| flashinfer-fp8-block | 0.0 % |" in large
    assert "4 … 4 --moe-backend triton, 2048 … 2048 --moe-backend flashinfer_cutlass" in text
    assert "decode --moe-backend triton, prefill --moe-backend flashinfer_cutlass" in text
    assert "`--moe-backend flashinfer_cutlass` (without a flag)" in text
    assert "Not here: deep-gemm: vLLM is not installed." in text
    (cost,) = [line for line in text.splitlines() if line.startswith("What vLLM runs") and "decode" in line]
    assert 150 < float(cost.split("costs ")[1].split(" %")[0]) < 250  # 3 ms instead of 1 ms


def test_a_second_call_measures_nothing_that_the_journal_has(planted, tmp_path, monkeypatch):
    measured(tmp_path)
    monkeypatch.setattr(rivals.moetune, "tune_all", None)
    assert measured(tmp_path)[0] == 0


def test_without_time_no_deployment_begins(planted, tmp_path):
    left, journal = measured(tmp_path, end=time.time())
    assert (left, journal.lines) == (1, [])


def test_an_empty_journal_is_said_to_be_empty():
    assert list(rivals.report([])) == ["No deployments."]


@pytest.mark.parametrize(("left", "code"), [(2, 1), (0, None)])
def test_a_run_that_leaves_deployments_exits_1_so_that_it_is_started_again(monkeypatch, tmp_path, left, code):
    monkeypatch.setattr(rivals, "measure", lambda *given: left)
    monkeypatch.setattr(sys, "argv", ["rivals.py", "measure", str(tmp_path / "rivals.jsonl")])
    ended = None
    try:
        rivals.main()
    except SystemExit as error:
        ended = error.code
    assert ended == code
