"""Defines the rivals that run vLLM's own experts classes, with what vLLM computes around the GEMMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moetune.backends.base import Problem
from moetune.backends.grouped_triton import support
from moetune.backends.prepared import E4M3_MAX, WeightCache
from moetune.backends.rival import Rival
from moetune.backends.vllm_experts import engine
from moetune.backends.vllm_experts.engine import ExpertsClass
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

if TYPE_CHECKING:
    from moetune.backends.grouped_triton.weights import TritonExperts
    from moetune.backends.vllm_experts.batched import BatchedVllmRunner
    from moetune.backends.vllm_experts.runner import VllmRunner
    from moetune.backends.vllm_experts.weights import ScaledExperts

CUTLASS: Final = ExpertsClass("cutlass_moe", "CutlassExpertsFp8")
MIDDLE_MAX: Final = 32.0
"""The largest intermediate value if there is one scale a tensor. silu(gate) · up of normal values rarely exceeds it."""
_TOLERANCES: Final = {Precision.FP8_TENSOR: 5e-2, Precision.FP8_CHANNEL: 5e-2}
_MODULES: Final = ("moetune.backends.vllm_experts.runner", "moetune.backends.vllm_experts.weights")


class _DeepGemm(Rival):
    """What both rivals with DeepGEMM's kernels share: e4m3 weights in blocks of 128×128, vLLM, and a compiler.

    vLLM runs DeepGEMM for every row count: with scales that are powers of two (`VLLM_USE_DEEP_GEMM_E8M0`, the default)
    `TritonOrDeepGemmExperts` never takes Triton.
    """

    modules: tuple[str, ...] = _MODULES
    experts_class: ExpertsClass

    def __init__(self) -> None:
        super().__init__()
        self._weights: WeightCache[tuple[TritonExperts, engine.Prepared]] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if vLLM, DeepGEMM, a Hopper GPU or nvcc is missing."""
        return engine.lacking(self.experts_class) or engine.lacking_deep_gemm()

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why vLLM does not compute the layer with them: its rows, precision, activation, biases or sizes."""
        if reason := self.other_rows(regime):
            return reason
        if regime.layout == "pool":
            return "does not get the rows of a pool: vLLM leaves them to FlashInfer's kernels"
        if layer.precision is not Precision.FP8_BLOCK:
            return f"computes fp8_block experts, not {layer.precision.value}"
        if layer.activation is not Activation.SILU:
            return f"computes {Activation.SILU.value}, not {layer.activation.value}"
        return support.unsupported(layer, regime)

    def environment(self) -> dict[str, str]:
        """Returns vLLM's version, which brings the kernels and what runs around them."""
        return {"vllm": engine.version()}

    def tolerance(self, layer: MoELayer) -> float:
        """Returns that of the Triton kernel, because both round inputs and intermediate to e4m3 in groups of 128.

        A scale that is rounded up to a power of two costs no precision: e4m3 is a floating-point format.
        """
        return support.TOLERANCES[Precision.FP8_BLOCK]

    def _made(self, problem: Problem, **extra: Any) -> tuple[engine.Engine, Any, Any, TritonExperts]:
        """Returns vLLM's experts object, both GEMMs' weights as it reads them, and the same for the reference.

        Weights are kept for the next bucket.
        """
        from moetune.backends.vllm_experts.weights import block_experts

        experts, (w1, w2, scale1, scale2) = self._weights.get(problem, lambda: block_experts(problem))
        quant = {"w1_scale": scale1, "w2_scale": scale2, "block_shape": [128, 128]}
        return engine.make(self.experts_class, problem, quant, **extra), w1, w2, experts


class DeepGemmBackend(_DeepGemm):
    """Times DeepGEMM's contiguous grouped GEMMs as vLLM runs them on Hopper, on rows that come with their ids."""

    name = "deep-gemm"
    experts_class = ExpertsClass("deep_gemm_moe", "DeepGemmExperts")

    def prepared(self, problem: Problem) -> VllmRunner:
        """See `Rival.prepared`."""
        from moetune.backends.vllm_experts.runner import VllmRunner, random_inputs

        made, w1, w2, experts = self._made(problem)
        inputs = random_inputs(problem, experts.generator_state)
        return VllmRunner(problem, made, w1, w2, (experts.w1, experts.w2), inputs)


class BatchedDeepGemmBackend(_DeepGemm):
    """Times DeepGEMM's masked grouped GEMMs as vLLM runs them on Hopper, on expert-major rows."""

    name = "batched-deep-gemm"
    modules = (*_MODULES, "moetune.backends.vllm_experts.batched")
    experts_class = ExpertsClass("batched_deep_gemm_moe", "BatchedDeepGemmExperts")
    expert_major = True

    def prepared(self, problem: Problem) -> BatchedVllmRunner:
        """See `Rival.prepared`."""
        from moetune.backends.vllm_experts.batched import BatchedVllmRunner

        # vLLM takes the product of these as the capacity: the tokens of a rank, and the ranks
        made, w1, w2, experts = self._made(problem, max_num_tokens=problem.regime.capacity, num_dispatchers=1)
        return BatchedVllmRunner(problem, made, w1, w2, experts)


class VllmCutlassBackend(Rival):
    """Times vLLM's CUTLASS grouped GEMM for e4m3 weights with one scale a tensor or one a channel, on Hopper.

    With one scale a tensor the scales of inputs and intermediate are those of the checkpoint, with one a channel they
    are taken from each row.
    """

    name = "vllm-cutlass"
    modules = _MODULES

    def __init__(self) -> None:
        super().__init__()
        self._weights: WeightCache[ScaledExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if vLLM or a Hopper GPU is missing."""
        return engine.lacking(CUTLASS)

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why vLLM does not compute the layer with them: its rows, precision, activation, biases or sizes."""
        if reason := self.other_rows(regime):
            return reason
        if regime.layout in ("deduplicated", "pool"):
            return f"does not get the {regime.layout} rows of an all-to-all: vLLM gives them to other kernels"
        if layer.precision not in _TOLERANCES:
            return f"computes {' and '.join(_TOLERANCES)} experts, not {layer.precision.value}"
        if layer.activation is not Activation.SILU:
            return f"computes {Activation.SILU.value}, not {layer.activation.value}"
        if layer.expert_bias:
            return "adds no bias to an expert's GEMMs"
        if layer.weight_on_input:
            return "applies the router's weight to an expert's output, this layer to its input"
        intermediate = regime.intermediate_size(layer)
        if layer.hidden_size % 16 or intermediate % 16:
            return f"H = {layer.hidden_size} and I/tp = {intermediate} must be multiples of 16"
        return None

    def environment(self) -> dict[str, str]:
        """Returns vLLM's version, into which the kernels are compiled."""
        return {"vllm": engine.version()}

    def tolerance(self, layer: MoELayer) -> float:
        """Returns 5e-2, as of FlashInfer's fp8: inputs and intermediate are rounded to e4m3."""
        return _TOLERANCES[layer.precision]

    def prepared(self, problem: Problem) -> VllmRunner:
        """See `Rival.prepared`. Weights are kept for the next bucket."""
        import torch

        from moetune.backends.vllm_experts.runner import VllmRunner, random_inputs
        from moetune.backends.vllm_experts.weights import scaled_experts

        experts = self._weights.get(problem, lambda: scaled_experts(problem))
        inputs = random_inputs(problem, experts.generator_state)
        channel = problem.layer.precision is Precision.FP8_CHANNEL
        quant: dict[str, Any] = {"per_act_token_quant": channel, "per_out_ch_quant": channel}
        if not channel:
            largest = torch.stack([x.abs().max() for x in inputs]).max().float()
            quant["a1_scale"] = (largest / E4M3_MAX).reshape(1)
            quant["a2_scale"] = torch.full_like(quant["a1_scale"], MIDDLE_MAX / E4M3_MAX)
        weights = experts.w1.values, experts.w2.values
        scales = {"w1_scale": experts.w1.scales, "w2_scale": experts.w2.scales}
        if not channel:
            scales = {name: each.reshape(-1) for name, each in scales.items()}
        made = engine.make(CUTLASS, problem, {**scales, **quant})
        return VllmRunner(problem, made, *weights, (experts.w1, experts.w2), inputs)
