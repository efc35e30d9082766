"""The rivals that run vLLM's experts classes, on a planted vLLM with the real signatures."""

import pickle
from dataclasses import replace

import planted_vllm
import pytest
import torch

pytest.importorskip("triton")

from moetune.backends.base import FillableRunner, FillsPart, Problem
from moetune.backends.reference import relative_error
from moetune.backends.registry import backend, backends_computing
from moetune.backends.rival import ONLY_TACTIC
from moetune.backends.vllm_experts import engine
from moetune.backends.vllm_experts.weights import scaled_experts
from moetune.errors import UnsupportedError
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import padded, realize

CASES = [("deep-gemm", "fp8_block"), ("vllm-cutlass", "fp8_tensor"), ("vllm-cutlass", "fp8_channel")]


def small(precision, **fields):
    sizes = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "intermediate_size": 128}
    return MoELayer(**{**sizes, "precision": precision, **fields})


def problem(layer, regime, rows, rank=0, draws=2):
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings))


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """A machine with a Hopper GPU, nvcc and a planted vLLM; tensors stay on the CPU. Returns the experts made."""
    made = planted_vllm.plant(monkeypatch, tmp_path)
    monkeypatch.setattr(engine, "_folder", lambda: tmp_path / "vllm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("VLLM_USE_DEEP_GEMM", "VLLM_MOE_USE_DEEP_GEMM"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_each_is_a_rival_that_survives_a_pickle_and_is_not_tuned(name, precision):
    rival = pickle.loads(pickle.dumps(backend(name)))
    assert rival.rival
    assert rival.candidates(small(precision), Regime(), 4, "cuda").tactics == (ONLY_TACTIC,)
    assert name not in backends_computing(small(precision), Regime())


@pytest.mark.parametrize(
    ("name", "fields", "regime", "reason"),
    [
        ("deep-gemm", {"precision": "bf16"}, Regime(), "not bf16"),
        ("deep-gemm", {"precision": "fp8_block", "activation": "gelu"}, Regime(), "not gelu"),
        ("deep-gemm", {"precision": "fp8_block", "expert_bias": True}, Regime(), "bias"),
        ("deep-gemm", {"precision": "fp8_block", "intermediate_size": 192}, Regime(), "128"),
        ("deep-gemm", {"precision": "fp8_block"}, Regime(ep_size=4, layout="pool"), "pool"),
        ("deep-gemm", {"precision": "fp8_block"}, Regime(ep_size=4, layout="batched"), "batched"),
        ("batched-deep-gemm", {"precision": "fp8_block"}, Regime(ep_size=4), "batched"),
        ("batched-deep-gemm", {"precision": "bf16"}, Regime(ep_size=4, layout="batched"), "not bf16"),
        ("vllm-cutlass", {"precision": "fp8_block"}, Regime(), "not fp8_block"),
        ("vllm-cutlass", {"precision": "fp8_tensor", "activation": "gelu"}, Regime(), "not gelu"),
        ("vllm-cutlass", {"precision": "fp8_tensor", "weight_on_input": True}, Regime(), "input"),
        ("vllm-cutlass", {"precision": "fp8_tensor", "expert_bias": True}, Regime(), "bias"),
        ("vllm-cutlass", {"precision": "fp8_tensor", "intermediate_size": 72}, Regime(), "16"),
        ("vllm-cutlass", {"precision": "fp8_tensor"}, Regime(ep_size=4, layout="deduplicated"), "deduplicated"),
    ],
)
def test_each_thing_that_it_does_not_compute_has_a_reason_of_its_own(name, fields, regime, reason):
    assert reason in (backend(name).unsupported(small(**fields), regime) or "")


def test_deepseek_s_layer_is_computed_with_one_deepgemm_block_a_tile():
    assert backend("deep-gemm").unsupported(preset("deepseek-r1"), Regime(ep_size=8)) is None


@pytest.mark.parametrize(
    "regime",
    [
        Regime(),
        Regime(ep_size=4),
        Regime(ep_size=4, dispatch="allgather"),
        Regime(ep_size=8, attention_dp=True),
        Regime(ep_size=3, uneven_shards=True),
        Regime(ep_size=4, layout="slot"),
    ],
    ids=lambda regime: regime.slug,
)
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_vllm_is_given_what_the_reference_computes(vllm, name, precision, regime):
    layer, rival = small(precision), backend(name)
    rank = regime.ep_size - 1
    runner = rival.prepare(problem(layer, regime, 12, rank))
    for draw in (0, 1):
        assert 0 < relative_error(runner.run(ONLY_TACTIC, draw), runner.reference(draw)) <= rival.tolerance(layer)
    (made,) = vllm
    shard = regime.shard(layer, rank)
    assert (made.moe_config.num_experts, made.moe_config.num_local_experts) == (shard.num_physical, shard.num_local)
    assert (made.moe_config.experts_per_token, made.moe_config.intermediate_size) == (regime.row_top_k(layer), 128)
    expert_map = made.calls[-1].expert_map
    if regime.ep_size == 1:
        assert expert_map is None
    else:
        local = [slot for slot, index in enumerate(expert_map.tolist()) if index >= 0]
        assert local == list(range(shard.first, shard.first + shard.num_local))


def test_deduplicated_rows_reach_deepgemm_as_they_are(vllm):
    layer, regime = small("fp8_block"), Regime(ep_size=4, layout="deduplicated")
    runner = backend("deep-gemm").prepare(problem(layer, regime, 12, 2))
    assert relative_error(runner.run(ONLY_TACTIC), runner.reference()) <= 8e-2


def expert_major(regime, tokens, rank=0):
    layer = small("fp8_block")
    draws = as_draws([padded(realize(layer, regime, rows, rank), regime.capacity) for rows in tokens])
    draws = tuple(replace(draw, rows=rows) for draw, rows in zip(draws, tokens, strict=True))
    return Problem(layer, regime, regime.capacity, regime.shard(layer, rank), draws)


BATCHED = Regime(ep_size=4, layout="batched", ladder=[40])


def test_expert_major_rows_reach_the_masked_kernels_with_their_counts(vllm):
    rival, asked = backend("batched-deep-gemm"), expert_major(BATCHED, (36, 8), rank=2)
    runner = rival.prepare(asked)
    assert isinstance(runner, FillsPart)
    for draw in (0, 1):
        filled = runner.filled(runner.run(ONLY_TACTIC, draw), draw)
        assert len(filled) == int(asked.draws[draw].routing.load.sum()) > 0
        assert 0 < relative_error(filled, runner.reference(draw)) <= rival.tolerance(asked.layer)
    counts = vllm[0].calls[-1].expert_tokens_meta.expert_num_tokens
    assert torch.equal(counts, asked.draws[1].routing.load.to(torch.int32))


@pytest.mark.parametrize(
    ("capacity", "tokens", "expected"), [(4096, 64, 16), (4096, 256, 64), (4096, 260, 80), (40, 256, 40)]
)
def test_vllm_is_told_the_rows_that_it_would_expect_for_an_expert(vllm, capacity, tokens, expected):
    """The tokens of all ranks times k over all experts, rounded up to 16: at least 16, at most the capacity."""
    regime = Regime(ep_size=4, layout="batched", ladder=[capacity])
    asked = expert_major(regime, (min(tokens, capacity),))
    asked = replace(asked, draws=tuple(replace(draw, rows=tokens) for draw in asked.draws))
    backend("batched-deep-gemm").prepare(asked)
    assert vllm[0].expected == [expected]


def test_without_rows_the_masked_kernels_have_nothing_to_do(vllm):
    asked = expert_major(BATCHED, (36,))
    routing = replace(asked.draws[0].routing, load=torch.zeros_like(asked.draws[0].routing.load))
    asked = replace(asked, draws=(replace(asked.draws[0], routing=routing),))
    runner = backend("batched-deep-gemm").prepare(asked)
    assert isinstance(runner, FillsPart)
    assert runner.filled(runner.run(ONLY_TACTIC), 0).shape == runner.reference().shape == (0, 256)


def test_a_preparation_runs_the_kernels_on_each_draw_and_weights_are_kept_for_the_next_bucket(vllm):
    rival, layer = backend("deep-gemm"), small("fp8_block")
    rival.prepare(problem(layer, Regime(), 4))
    rival.prepare(problem(layer, Regime(), 8))
    first, second = vllm
    assert (len(first.calls), len(second.calls)) == (2, 2)
    assert first.calls[0].w1.data_ptr() == second.calls[0].w1.data_ptr()


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_its_inputs_can_be_overwritten(vllm, name, precision):
    runner = backend(name).prepare(problem(small(precision), Regime(), 4, draws=1))
    assert isinstance(runner, FillableRunner)
    runner.inputs().x.zero_()
    assert not runner.run(ONLY_TACTIC).any()


def test_static_scales_are_given_for_one_scale_a_tensor_and_none_for_one_a_channel(vllm):
    for precision in ("fp8_tensor", "fp8_channel"):
        backend("vllm-cutlass").prepare(problem(small(precision), Regime(), 4))
    tensor, channel = (made.quant_config for made in vllm)
    assert (tensor.per_act_token_quant, tensor.per_out_ch_quant) == (False, False)
    assert (tensor.w1_scale.shape, tensor.a1_scale.shape, tensor.a2_scale.shape) == ((16,), (1,), (1,))
    assert (channel.per_act_token_quant, channel.per_out_ch_quant) == (True, True)
    assert (channel.w1_scale.shape, channel.w2_scale.shape) == ((16, 256, 1), (16, 256, 1))
    assert channel.a1_scale is channel.a2_scale is None


def test_weights_use_the_range_of_e4m3():
    for precision in ("fp8_tensor", "fp8_channel"):
        experts = scaled_experts(problem(small(precision), Regime(), 4))
        largest = experts.w1.values.float().abs().amax((1, 2) if precision == "fp8_tensor" else 2)
        assert (largest == 448).all()


def test_an_apply_with_other_arguments_is_refused_by_name(vllm, monkeypatch):
    monkeypatch.setattr(planted_vllm.DeepGemmExperts, "apply", lambda self, output, hidden_states, news: None)
    with pytest.raises(UnsupportedError, match=r"DeepGemmExperts\.apply .* differs .*news"):
        backend("deep-gemm").prepare(problem(small("fp8_block"), Regime(), 4))


def test_without_vllm_the_lack_is_named(monkeypatch):
    monkeypatch.setattr(engine, "_folder", lambda: None)
    for name in ("deep-gemm", "vllm-cutlass"):
        assert backend(name).unavailable() == ("vLLM is not installed", "pip install vllm")


def test_each_lack_of_deepgemm_has_a_reason_of_its_own(vllm, monkeypatch, tmp_path):
    rival = backend("deep-gemm")
    assert rival.unavailable() is None
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine, "_TOOLKIT", str(tmp_path / "cuda"))
    assert "nvcc" in rival.unavailable()[0]
    (tmp_path / "vllm/third_party/deep_gemm").rmdir()
    assert "third_party.deep_gemm" in rival.unavailable()[0]
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    assert "VLLM_USE_DEEP_GEMM=0" in rival.unavailable()[0]
    assert backend("vllm-cutlass").unavailable() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "9.0; the device has 10.0" in rival.unavailable()[0]
    (tmp_path / "vllm/model_executor/layers/fused_moe/experts/deep_gemm_moe.py").unlink()
    assert "experts/deep_gemm_moe.py" in rival.unavailable()[0]
