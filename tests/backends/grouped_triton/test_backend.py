"""What the backend says before any kernel runs."""

import json
from pathlib import Path

import pytest
import torch
from recorded import H200

from moetune.backends.base import Backend, Problem
from moetune.backends.grouped_triton import space
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize


def test_it_is_a_backend():
    assert isinstance(TritonBackend(), Backend)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("gpt-oss-120b", "mxfp4"),
        ("llama4-maverick", "to its input"),
    ],
)
def test_layers_that_it_does_not_compute_are_refused_with_the_reason(model, reason):
    assert reason in (TritonBackend().unsupported(preset(model), Regime()) or "")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"activation": "swiglu_clamped"}, "swiglu_clamped"),
        ({"expert_bias": True}, "bias"),
        ({"weight_on_input": True}, "input"),
        ({"precision": "fp16"}, "not fp16"),
        ({"precision": "fp8_block", "intermediate_size": 192}, "I/tp = 192"),
    ],
)
def test_each_thing_that_it_lacks_has_a_reason_of_its_own(fields, reason):
    layer = MoELayer(**{"num_experts": 8, "top_k": 2, "hidden_size": 256, "intermediate_size": 256, **fields})
    assert reason in (TritonBackend().unsupported(layer, Regime()) or "")


@pytest.mark.parametrize("model", ["deepseek-r1", "qwen3-235b-a22b", "qwen3-30b-a3b", "minimax-m2.5"])
def test_the_layers_that_hopper_serves_are_supported(model):
    assert TritonBackend().unsupported(preset(model), Regime(ep_size=8)) is None


def test_tensor_parallel_slices_that_cut_a_scale_block_are_refused():
    assert TritonBackend().unsupported(preset("deepseek-r1"), Regime(tp_size=32)) is not None
    assert TritonBackend().unsupported(preset("deepseek-r1"), Regime(tp_size=16)) is None


def test_the_kernel_and_what_becomes_of_remote_slots_are_strict():
    drop, zero = TritonBackend().environment(), TritonBackend(remote="zero").environment()
    assert {name for name in drop if drop[name] != zero[name]} == {"remote"}
    assert drop.keys() == {"triton", "kernel", "kernel_source", "remote"}


def test_by_default_sglang_zeroes_and_vllm_drops():
    assert TritonBackend("sglang").remote == "zero"
    assert TritonBackend("vllm").remote == "drop"
    assert TritonBackend("sglang", "drop").remote == "drop"


def test_unknown_options_are_usage_errors():
    with pytest.raises(UsageError, match="builtin, vllm, sglang"):
        TritonBackend("trtllm")
    with pytest.raises(UsageError, match="drop or zero"):
        TritonBackend(remote="skip")


def test_a_plan_on_a_machine_without_gpu_lists_candidates_with_the_default():
    layer, regime, backend = preset("qwen3-235b-a22b"), Regime(ep_size=8), TritonBackend()
    found = backend.candidates(layer, regime, 256, "cpu")
    assert backend.default(layer, regime, 256) in found.tactics
    assert len(found.tactics) + len(found.excluded) == 1920


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_and_prepares_nothing():
    layer, regime = preset("qwen3-30b-a3b"), Regime(ep_size=8)
    assert "CUDA" in TritonBackend().unavailable()[0]
    with pytest.raises(UnsupportedError, match="CUDA"):
        TritonBackend().prepare(Problem(layer, regime, 4, regime.shard(layer), ()))


def test_the_likeliest_tactic_is_the_default(monkeypatch):
    backend, regime = TritonBackend(), Regime(ep_size=8, attention_dp=True)
    layer = preset("qwen3-235b-a22b")
    limits = space.Limits((9, 0), 232448, 255, 65536)
    monkeypatch.setattr(space.Limits, "of", classmethod(lambda cls, device: limits))
    monkeypatch.setattr(space, "machine", lambda device: H200)
    routings = tuple(realize(layer, regime, 64, draw=draw) for draw in range(regime.draws))
    problem = Problem(layer, regime, 64, regime.shard(layer), as_draws(routings))
    candidates = backend.candidates(layer, regime, 64, "cuda")
    likely = backend.likely(problem, candidates)
    assert likely[0] == backend.default(layer, regime, 64)
    assert sorted(map(str, likely)) == sorted(map(str, candidates.tactics))
    assert set(next(backend.search(problem, candidates, ())).tactics) <= set(likely[:32])


def test_packaged_profiles_were_measured_with_the_kernels_of_this_package():
    """An edit of a kernel's file, of a comment too, changes the digest, and no packaged profile is served any more."""
    folder = Path(__file__).parents[3] / "profiles"
    stored = [json.loads(path.read_text())["environment"] for path in folder.rglob("triton-*.json")]
    digests = {strict["kernel_source"] for strict in map(_strict, stored) if strict["kernel"] == "builtin"}
    assert digests == {TritonBackend().environment()["kernel_source"]}


def _strict(environment):
    return environment.get("strict", environment)
