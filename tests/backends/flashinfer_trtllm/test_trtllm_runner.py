"""Every argument reaches the compiled module through FlashInfer's own code, in every branch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trtllm_native as native
from trtllm_compiled import CompiledModule
from trtllm_questions import REGIMES, SIZES, backend, layer, problem

from moetune.backends.flashinfer_trtllm.backend import TrtllmBackend
from moetune.errors import UnsupportedError
from moetune.recordings.reading import with_digest
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

TACTIC = Tactic(tile_n=32, config=7)
QUANTIZED_SCALES = {
    ("fp8_block", "hidden_states"): ((16, 256), torch.float8_e4m3fn),
    ("fp8_block", "hidden_states_scale"): ((2, 16), torch.float32),
    ("fp8_tensor", "hidden_states"): ((16, 128), torch.float8_e4m3fn),
    ("nvfp4", "hidden_states"): ((16, 256), torch.uint8),
    ("nvfp4", "hidden_states_scale"): ((16, 32), torch.float8_e4m3fn),
    ("mxfp8", "hidden_states"): ((16, 256), torch.float8_e4m3fn),
    ("mxfp8", "hidden_states_scale"): ((16, 8), torch.float8_e4m3fn),
    ("bf16", "hidden_states"): ((16, None), torch.bfloat16),
}
NATIVE = {
    Precision.BF16: "trtllm_bf16_moe",
    Precision.FP8_BLOCK: "trtllm_fp8_block_scale_moe",
    Precision.FP8_TENSOR: "trtllm_fp8_per_tensor_scale_moe",
    Precision.NVFP4: "trtllm_fp4_block_scale_moe",
    Precision.MXFP4: "trtllm_fp4_block_scale_moe",
    Precision.MXINT4: "trtllm_mxint4_block_scale_moe",
}


def branches() -> Iterator[Any]:
    for precision in SIZES:
        for how in ("logits", "packed", "unpacked"):
            if (precision, how) == (Precision.MXINT4, "unpacked"):
                continue
            for activations in ("bf16", "mxfp8") if precision is Precision.MXFP4 else (None,):
                for quantized in (True, False):
                    name = f"{precision}-{activations or 'own'}-{how}-{'quantized' if quantized else 'bf16'}"
                    yield pytest.param(precision, activations, how, quantized, id=name)


@pytest.mark.parametrize(("precision", "activations", "how", "quantized"), list(branches()))
def test_the_compiled_module_gets_what_the_reference_computes(
    compiled: CompiledModule, precision: Precision, activations: Any, how: str, quantized: bool
) -> None:
    asked = layer(precision)
    options = {"mxfp4_activations": activations} if activations else {}
    made = backend(how, quantized=quantized, **options)
    regime = Regime(ep_size=4, dispatch="allgather", tune_max_num_tokens=4096)
    runner = made.prepare(problem(asked, regime, draws=2))
    assert not compiled.calls, "preparing launches nothing"
    for draw in range(2):
        runner.run(TACTIC, draw)
        function, arguments = compiled.calls.pop()
        routed_function = precision is Precision.FP8_TENSOR and how != "logits"
        assert function == (NATIVE[precision].replace("_moe", "_routed_moe") if routed_function else NATIVE[precision])
        assert native.given(arguments, "moe_tactic", "config_index") == [32, 7]
        assert (arguments["num_experts"], arguments["top_k"]) == (16, 3)
        assert (arguments["local_expert_offset"], arguments["local_num_experts"]) == (4, 4)
        reference = runner.reference(draw)
        computed = native.output(function, arguments)[:, : asked.hidden_size]
        assert reference.norm() > 1
        assert (computed - reference).norm() / reference.norm() < 1e-3


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("how", ["logits", "packed"])
@pytest.mark.parametrize(
    ("precision", "activations"),
    [
        (Precision.BF16, "bf16"),
        (Precision.FP8_BLOCK, "fp8_block"),
        (Precision.FP8_TENSOR, "fp8_tensor"),
        (Precision.NVFP4, "nvfp4"),
        (Precision.MXFP4, "bf16"),
        (Precision.MXFP4, "mxfp8"),
        (Precision.MXINT4, "bf16"),
    ],
)
def test_activations_have_the_kernels_form_and_are_quantized_in_the_run_only_where_they_arrive_in_bf16(
    compiled: CompiledModule,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    activations: Any,
    how: str,
    quantized: bool,
) -> None:
    from moetune.backends.flashinfer_trtllm.weights import Weights

    options = {"mxfp4_activations": activations} if precision is Precision.MXFP4 else {}
    runner = backend(how, quantized=quantized, **options).prepare(problem(layer(precision), Regime(ep_size=4)))
    times: list[torch.Tensor] = []
    quantize = Weights.quantize
    monkeypatch.setattr(Weights, "quantize", lambda self, x: (times.append(x), quantize(self, x))[1])
    runner.run(TACTIC)
    assert len(times) == (0 if quantized or activations == "bf16" else 1)
    _, arguments = compiled.calls.pop()
    for name in ("hidden_states", "hidden_states_scale"):
        form = QUANTIZED_SCALES.get((activations, name))
        tensor = arguments.get(name)
        if form is None:
            assert tensor is None
            continue
        shape, dtype = form
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tuple(tensor.shape) == (shape[0], shape[1] or tensor.shape[1])


@pytest.mark.parametrize("dispatch", ["none", "alltoall", "allgather"])
def test_activations_arrive_quantized_where_tokens_travel(
    compiled: CompiledModule, monkeypatch: pytest.MonkeyPatch, dispatch: str
) -> None:
    from moetune.backends.flashinfer_trtllm.weights import Weights

    runner = backend("packed").prepare(problem(layer(Precision.NVFP4), Regime(ep_size=4, dispatch=dispatch)))
    quantized: list[bool] = []
    quantize = Weights.quantize
    monkeypatch.setattr(Weights, "quantize", lambda self, x: (quantized.append(True), quantize(self, x))[1])
    runner.run(TACTIC)
    assert bool(quantized) == (dispatch == "none")


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("how", ["logits", "packed", "unpacked"])
@pytest.mark.parametrize("distribution", ["random", "balanced"])
def test_the_ids_that_a_tactic_sees_have_the_regimes_histogram(
    compiled: CompiledModule, name: str, how: str, distribution: str
) -> None:
    asked = layer(Precision.BF16)
    regime = Regime(**REGIMES[name], distribution=distribution)
    question = problem(asked, regime, draws=2, rows=20)
    runner = backend(how).prepare(question)
    for draw, routing in enumerate(each.routing for each in question.draws):
        runner.run(TACTIC, draw)
        _, arguments = compiled.calls.pop()
        ids, weights = native.chosen(arguments)
        local = ids.long() - question.shard.first
        local = local[(local >= 0) & (local < question.shard.num_local)]
        assert torch.equal(torch.bincount(local, minlength=question.shard.num_local), routing.load)
        for row in ids.tolist():
            remote = [expert for expert in row if expert >= 0]
            assert len(remote) == len(set(remote))
            assert all(expert < 16 for expert in remote)
        if how != "logits":
            assert torch.equal(ids, routing.topk_ids)
            expected = routing.topk_weights if how == "unpacked" else routing.topk_weights.bfloat16().float()
            assert torch.equal(weights, expected)
        elif int(routing.topk_ids.min()) >= 0:
            assert torch.equal(ids.sort(1).values, routing.topk_ids.long().sort(1).values)


@pytest.mark.parametrize("how", ["logits", "packed", "unpacked"])
def test_a_recordings_tokens_reach_the_kernel_with_their_experts(
    compiled: CompiledModule, how: str, tmp_path: Path
) -> None:
    recorded = [[0, 5, 9], [15, 2, 4], [7, 8, 1], [12, 13, 3]]
    np.save(tmp_path / "traffic.npy", np.array(recorded, dtype=np.int32))
    regime = with_digest(Regime(ep_size=4, dispatch="allgather", distribution=f"replay:{tmp_path / 'traffic.npy'}"))
    runner = backend(how).prepare(problem(layer(), regime, draws=2, rows=20))
    rows = {tuple(sorted(row)) for row in recorded}
    for draw in range(2):
        runner.run(TACTIC, draw)
        _, arguments = compiled.calls.pop()
        ids, _ = native.chosen(arguments)
        assert {tuple(sorted(row)) for row in ids.tolist()} <= rows
        if how != "logits":
            assert {tuple(row) for row in ids.tolist()} <= {tuple(row) for row in recorded}
    assert ("routing_logits" in arguments and arguments["routing_logits"] is not None) == (how == "logits")


def test_each_call_has_its_draws_routing_and_inputs(compiled: CompiledModule) -> None:
    runner = backend("packed").prepare(problem(layer(), Regime(ep_size=4), draws=3))
    seen = []
    for draw in (0, 1, 2, 0):
        runner.run(TACTIC, draw)
        _, arguments = compiled.calls.pop()
        seen.append((arguments["expert_indices"].clone(), arguments["hidden_states"].clone()))
    for part in (0, 1):
        assert torch.equal(seen[0][part], seen[3][part])
        assert not torch.equal(seen[0][part], seen[1][part])
        assert not torch.equal(seen[1][part], seen[2][part])


@pytest.mark.parametrize("how", ["logits", "packed", "unpacked"])
def test_the_routers_weight_is_applied_to_llama4s_inputs(compiled: CompiledModule, how: str) -> None:
    router = RoutingMethod(scoring="sigmoid", renormalize=False)
    asked = layer(Precision.FP8_TENSOR, top_k=1, routing=router, weight_on_input=True)
    runner = backend(how).prepare(problem(asked, Regime(ep_size=2)))
    runner.run(TACTIC)
    function, arguments = compiled.calls.pop()
    assert arguments["use_routing_scales_on_input"] is True
    reference = runner.reference()
    assert reference.norm() > 1
    assert (native.output(function, arguments) - reference).norm() / reference.norm() < 1e-3


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8_BLOCK])
def test_the_clamped_swiglus_numbers_reach_the_kernel(compiled: CompiledModule, precision: Precision) -> None:
    asked = layer(precision, activation=Activation.SWIGLU_CLAMPED)
    runner = backend("packed").prepare(problem(asked, Regime(ep_size=4)))
    runner.run(TACTIC)
    function, arguments = compiled.calls.pop()
    assert arguments["gemm1_alpha"].tolist() == pytest.approx([1.702] * 4)
    assert arguments["gemm1_beta"].tolist() == [1.0] * 4
    assert arguments["gemm1_clamp_limit"].tolist() == [7.0] * 4
    reference = runner.reference()
    assert (native.output(function, arguments) - reference).norm() / reference.norm() < 1e-3


@pytest.mark.parametrize("how", ["logits", "packed"])
def test_deepseeks_experts_can_lie_as_in_the_checkpoint(compiled: CompiledModule, how: str) -> None:
    made = backend(how, fp8_block_layout="plain")
    asked, regime = layer(Precision.FP8_BLOCK), Regime(ep_size=4)
    made.candidates(asked, regime, 16, "cpu")
    assert {(query["use_shuffled_weight"], query["weight_layout"]) for query in compiled.queries} == {(False, 0)}
    runner = made.prepare(problem(asked, regime))
    runner.run(TACTIC)
    function, arguments = compiled.calls.pop()
    assert arguments["gemm1_weights"].shape == (4, 256, 256)
    reference = runner.reference()
    assert (native.output(function, arguments) - reference).norm() / reference.norm() < 1e-3


@pytest.mark.parametrize(("hidden_dtype", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_kernel_writes_bf16_and_a_run_returns_the_engines_dtype(
    compiled: CompiledModule, hidden_dtype: str, dtype: torch.dtype
) -> None:
    runner = backend("packed", hidden_dtype=hidden_dtype).prepare(problem(layer(Precision.MXFP4), Regime(ep_size=4)))
    out = runner.run(TACTIC)
    _, arguments = compiled.calls.pop()
    assert arguments["output"].dtype == torch.bfloat16
    assert arguments["output"].shape == (16, 256)
    assert (out.dtype, out.shape) == (dtype, (16, 160))
    aliased = out.untyped_storage().data_ptr() == arguments["output"].untyped_storage().data_ptr()
    assert aliased == (dtype is torch.bfloat16)


def test_the_default_is_the_launchers_own_choice(compiled: CompiledModule) -> None:
    made = backend("packed")
    asked, regime = layer(), Regime(ep_size=4)
    made.prepare(problem(asked, regime)).run(made.default(asked, regime, 16))
    assert compiled.calls.pop()[1]["moe_tactic"] == [-1, -1]


def test_weights_are_kept_for_the_next_bucket_and_made_anew_for_another_rank(compiled: CompiledModule) -> None:
    made = backend("packed")
    asked, regime = layer(), Regime(ep_size=4)

    def weights(rows: int, rank: int) -> torch.Tensor:
        made.prepare(problem(asked, regime, rows=rows, rank=rank)).run(TACTIC)
        return compiled.calls.pop()[1]["gemm1_weights"]

    first = weights(16, 1)
    assert weights(32, 1) is first
    assert weights(16, 2) is not first


def test_flashinfers_tuner_is_put_back(compiled: CompiledModule) -> None:
    from flashinfer.autotuner import AutoTuner

    before = AutoTuner.get()
    backend("packed").prepare(problem(layer(), Regime(ep_size=4)))
    assert AutoTuner.get() is before


def test_an_unsupported_layer_is_refused_before_anything_is_made(compiled: CompiledModule) -> None:
    asked: MoELayer = layer().model_copy(update={"precision": Precision.FP16})
    with pytest.raises(UnsupportedError, match="flashinfer-trtllm computes bf16"):
        TrtllmBackend().prepare(problem(asked, Regime(ep_size=4)))
