"""`moetune tune --export`: from a launch line to a folder that the engine reads."""

import importlib
import json

import pytest

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.cli.options import request_of
from moetune.cli.written import request_for_engine
from moetune.errors import NoResultError, UsageError
from moetune.spec.environment import Environment
from moetune.store.profile import Choice, Profile

LAUNCH = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep --moe-backend triton > log"
SLUG = "ep8-tp1-dp-allgather-random"
NAME = "E=16,N=1536,device_name=NVIDIA_H200.json"
TACTIC = {
    "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 4,
}  # fmt: skip


@pytest.fixture
def tuned(monkeypatch):
    """A tune that answers any question with one bucket, and the questions that it got."""
    asked = []

    def answer(layer, regime, *, backend, on_event, **options):
        asked.append((layer, regime, backend))
        choice = Choice(
            rows=regime.buckets[0], tactic=TACTIC, time_us=8.0, default_tactic=TACTIC, default_time_us=8.0, gain=1.0,
            gain_low=1.0, gain_high=1.0, noise=0.01, tried=9, candidates=9, load=(4,), max_load=4,
            measured_at="2026-11-27T12:00:00Z",
        )  # fmt: skip
        strict = {"compute_capability": "9.0", "triton": "3.6.0", "remote": "drop"}
        environment = Environment(device="NVIDIA H200", strict=strict)
        return Profile(layer=layer, regime=regime, backend=backend.name, environment=environment, choices=(choice,))

    monkeypatch.setattr(importlib.import_module("moetune.tuning.tune"), "tune", answer)
    return asked


def test_one_command_leads_from_a_launch_line_to_a_folder_that_the_engine_reads(moetune, tuned, tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    result = moetune("tune", "--launch", LAUNCH, "--export", out, "--store", store)
    assert result.exit_code == 0, result.stderr
    assert f"export VLLM_TUNED_CONFIG_FOLDER={out.resolve()}/{SLUG}" in result.stdout.splitlines()
    table = json.loads((out / SLUG / NAME).read_text())
    assert table["1"] == {name: value for name, value in TACTIC.items() if name != "triton_version"}
    ((_, regime, backend),) = tuned
    assert (regime.slug, backend.name) == (SLUG, "triton")


def test_the_json_document_has_what_was_written(moetune, tuned, tmp_path):
    words = ("tune", "--launch", LAUNCH, "--export", tmp_path / "out", "--store", tmp_path / "store", "--json")
    exported = json.loads(moetune(*words).stdout)["exported"]
    assert exported["target"] == "vllm"
    assert exported["variables"] == {"VLLM_TUNED_CONFIG_FOLDER": str((tmp_path / "out" / SLUG).resolve())}
    assert [file["state"] for file in exported["files"]] == ["written"] * len(exported["files"])


def test_without_an_engine_nothing_is_tuned(moetune, tuned, tmp_path):
    result = moetune("tune", "--model", "qwen3-30b-a3b", "--ep", "8", "--export", tmp_path / "out")
    assert result.exit_code == 2
    assert "--export needs an engine" in result.stderr
    assert not tuned


@pytest.mark.parametrize(
    ("dispatch", "dp", "backend", "remote"),
    [
        ("vllm:allgather_reducescatter", None, "triton", "drop"),
        ("sglang:none", None, "triton", "zero"),
        ("trtllm:attention_dp", None, "flashinfer-trtllm-routed", None),
        ("trtllm:none", False, "flashinfer-trtllm", None),
    ],
)
def test_auto_becomes_the_backend_that_the_engines_files_need(dispatch, dp, backend, remote):
    request = request_for_engine(request_of("deepseek-r1", ep=8, dispatch=dispatch, dp=dp))
    assert (request.backend.name, request.auto) == (backend, False)
    if remote is not None:
        assert request.backend.environment()["remote"] == remote


def test_kernels_that_read_no_file_are_refused():
    request = request_of("qwen3-30b-a3b", ep=8, dispatch="vllm:allgather_reducescatter", backend="flashinfer-cutlass")
    with pytest.raises(UsageError, match="reads files for Triton kernels only, not for flashinfer-cutlass"):
        request_for_engine(request)


FP8 = "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --moe-backend triton"


def test_a_tune_for_an_older_vllm_measures_its_kernel(moetune, tuned, tmp_path):
    words = ("tune", "--launch", FP8, "--export", tmp_path / "out", "--store", tmp_path / "store")
    moetune(*words, "--for-version", "0.20.2")
    moetune(*words)
    versions = [backend.environment().get("kernel_version") for _, _, backend in tuned]
    assert versions == ["0.19", None]


def test_a_version_without_an_export_and_a_contradicting_kernel_are_refused_before_anything_is_tuned(
    moetune, tuned, tmp_path
):
    alone = moetune("tune", "--launch", FP8, "--for-version", "0.20.2")
    assert (alone.exit_code, "--for-version needs --export" in alone.stderr) == (2, True)
    words = ("--export", tmp_path / "out", "--for-version", "0.20.2", "--backend-option", "kernel_version=0.33")
    other = moetune("tune", "--launch", FP8, *words)
    assert (other.exit_code, "vLLM 0.20.2 is not the one that was chosen: 0.33" in other.stderr) == (2, True)
    assert not tuned


@pytest.mark.parametrize(
    ("asked", "remote"),
    [
        (("--launch", "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8 --ep 8"), "zero"),
        (("--model", "deepseek-r1", "--ep", "8", "--dispatch", "sglang:none"), "zero"),
        (("--model", "deepseek-r1", "--ep", "8", "--dispatch", "vllm:allgather_reducescatter"), "drop"),
    ],
    ids=["SGLang's line", "SGLang's dispatcher", "vLLM's dispatcher"],
)
def test_with_and_without_an_export_auto_measures_the_same_kernel(moetune, monkeypatch, tmp_path, asked, remote):
    """SGLang's kernel writes zeros for non-local slots, vLLM's newest skips them."""
    measured = []

    def answer(layer, regime, backend, *others, **options):
        measured.append(backend.environment())
        raise NoResultError("There is no GPU.")

    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(importlib.import_module("moetune.tuning.tune"), "tune", answer)
    for words in ((), ("--export", tmp_path / "out")):
        assert moetune("tune", *asked, *words, "--store", tmp_path / "store").exit_code == 1
    without, exported = measured
    assert without == exported
    assert without["remote"] == remote
