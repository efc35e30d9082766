"""The two backends of FlashInfer's trtllm-gen kernels: with given ids, and with logits that the kernel routes."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, ClassVar, Literal

from moetune.backends.base import Candidates, Problem
from moetune.backends.flashinfer_trtllm.formats import (
    FORMATS,
    INTERMEDIATE_TOLERANCES,
    Activations,
    ExpertSizes,
    Format,
    Fp8BlockLayout,
)
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import flashinfer_versions
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.flashinfer_trtllm.runner import Ids, TrtllmRunner
    from moetune.backends.flashinfer_trtllm.weights import Weights

CAPABILITIES = ((10, 0), (10, 3))
NEEDED_VERSION = (0, 7, 2)
HiddenDtype = Literal["bfloat16", "float16", "float32"]
_HIDDEN_DTYPES = ("bfloat16", "float16", "float32")
_FP8_BLOCK_LAYOUTS = ("blocked", "plain")
_ROUTED_TOP_K = 32


class TrtllmBackend:
    """The op that routes from logits (SGLang's `flashinfer_trtllm`, vLLM's monolithic kernels).

    Args:
        mxfp4_activations: what mxfp4 weights are multiplied with, `bf16` or `mxfp8`.
        quantized: whether activations arrive quantized, so that quantizing is not timed; when not given, they do
            where tokens travel (an engine quantizes before it sends), and do not where they stay.
        fp8_block_layout: of DeepSeek's e4m3 experts: `blocked` as vLLM has them, `plain` as SGLang.
        hidden_dtype: the engine's; the kernels write bf16, and the cast to another dtype is timed with them.

    Raises:
        UsageError: no such value.
    """

    name: ClassVar[str] = "flashinfer-trtllm"

    def __init__(
        self,
        *,
        mxfp4_activations: Activations = "bf16",
        quantized: bool | None = None,
        fp8_block_layout: Fp8BlockLayout = "blocked",
        hidden_dtype: HiddenDtype = "bfloat16",
    ) -> None:
        allowed = FORMATS[Precision.MXFP4].activations
        if mxfp4_activations not in allowed:
            raise UsageError(f"mxfp4_activations must be one of {', '.join(allowed)}; given {mxfp4_activations!r}.")
        if hidden_dtype not in _HIDDEN_DTYPES:
            raise UsageError(f"hidden_dtype must be one of {', '.join(_HIDDEN_DTYPES)}; given {hidden_dtype!r}.")
        if fp8_block_layout not in _FP8_BLOCK_LAYOUTS:
            raise UsageError(
                f"fp8_block_layout must be one of {', '.join(_FP8_BLOCK_LAYOUTS)}; given {fp8_block_layout!r}."
            )
        self.mxfp4_activations = mxfp4_activations
        self.fp8_block_layout = fp8_block_layout
        self.quantized = quantized
        self.hidden_dtype = hidden_dtype
        self._weights: WeightCache[Weights] = WeightCache()

    @property
    def ids(self) -> Ids:
        """How calls are routed."""
        return "logits"

    def unavailable(self) -> tuple[str, str] | None:
        """No FlashInfer 0.7.2, or no device of compute capability 10.0 or 10.3."""
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed", "pip install flashinfer-python"
        installed = flashinfer_versions.version() or "unknown"
        if tuple(int(part) for part in re.findall(r"\d+", installed)[:3]) < NEEDED_VERSION:
            return f"needs FlashInfer 0.7.2 or later, installed is {installed}", "pip install -U flashinfer-python"
        import torch

        needed = "needs compute capability 10.0 or 10.3 (B200, GB200, B300, GB300)"
        if not torch.cuda.is_available():
            return f"{needed}, and torch sees no CUDA device", "Run on such a GPU with a CUDA build of torch."
        if (capability := torch.cuda.get_device_capability()) not in CAPABILITIES:
            return (
                f"{needed}, the device has {capability[0]}.{capability[1]}",
                "Use another backend: `moetune doctor` lists those that run here.",
            )
        return None

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """fp32 and fp16; sizes that the kernels' tiles do not divide; what a format's kernels lack; its routing."""
        fmt = FORMATS.get(layer.precision)
        if fmt is None:
            return f"computes {', '.join(FORMATS)} experts, not {layer.precision.value}"
        intermediate = regime.intermediate_size(layer)
        if not fmt.padded and (layer.hidden_size % fmt.multiple_of or intermediate % fmt.multiple_of):
            return (
                f"needs multiples of {fmt.multiple_of} for {layer.precision.value} experts; "
                f"given H = {layer.hidden_size} and I/tp = {intermediate}"
            )
        return self._lacking(fmt, layer) or self._routing_unsupported(fmt, layer, regime)

    @staticmethod
    def _lacking(fmt: Format, layer: MoELayer) -> str | None:
        if layer.activation is not Activation.SILU and not (
            layer.activation is Activation.SWIGLU_CLAMPED and fmt.clamped
        ):
            return f"computes no {layer.activation.value} with {layer.precision.value} experts"
        if layer.expert_bias and not fmt.bias:
            return f"adds no bias to {layer.precision.value} experts"
        if layer.weight_on_input and not (fmt.weight_on_input and layer.top_k == 1):
            return (
                f"applies the router's weight to the input of fp8_tensor experts at top_k = 1 only, "
                f"not of {layer.precision.value} ones at {layer.top_k}"
            )
        if layer.precision is Precision.FP8_BLOCK and layer.num_experts % 4:
            return f"needs a multiple of 4 experts, given {layer.num_experts}"
        return None

    def _routing_unsupported(self, fmt: Format, layer: MoELayer, regime: Regime) -> str | None:
        from moetune.backends.flashinfer_trtllm.logits import kernel_routing

        if regime.redundant_experts:
            return "routes from logits of experts and knows no redundant ones; use flashinfer-trtllm-routed"
        top_k = regime.row_top_k(layer)
        try:
            routing = kernel_routing(layer)
        except UnsupportedError as error:
            return f"{error.message}; use flashinfer-trtllm-routed"
        most = (8 if layer.num_experts <= 384 else 22) if routing.name == "DeepSeekV3" else _ROUTED_TOP_K
        if top_k > most:
            return f"routes to {most} experts at most by {routing.name}, not {top_k}; use flashinfer-trtllm-routed"
        return None

    def environment(self) -> dict[str, str]:
        """FlashInfer's version, and the options, all of which change what is timed."""
        quantized = {None: "where tokens travel", True: "yes", False: "no"}[self.quantized]
        return {
            "flashinfer": flashinfer_versions.version() or "unknown",
            "ids": self.ids,
            "mxfp4_activations": self.mxfp4_activations,
            "arrives_quantized": quantized,
            "fp8_block_layout": self.fp8_block_layout,
            "hidden_dtype": self.hidden_dtype,
        }

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """The default, and what FlashInfer's runner enumerates at `rows` and at the regime's real load.

        Raises:
            UnsupportedError: this layer is not computed.
        """
        import torch

        from moetune.backends.flashinfer_trtllm import arguments
        from moetune.backends.flashinfer_trtllm.call import record_call
        from moetune.backends.flashinfer_trtllm.enumeration import enumerate_tactics, equivalent_rows
        from moetune.backends.flashinfer_trtllm.logits import kernel_routing
        from moetune.workload.routing import realize

        self._check(layer, regime)
        fmt, shard, sizes = FORMATS[layer.precision], regime.shard(layer), self._sizes(layer, regime)
        routing = realize(layer, regime, rows)
        top_k = routing.topk_ids.shape[1]

        def meta(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=dtype, device="meta")

        hidden, e4m3 = sizes.padded_hidden, torch.float8_e4m3fn
        activations: dict[Activations, tuple[torch.Tensor, torch.Tensor | None]] = {
            "bf16": (meta(hidden, torch.bfloat16), None),
            "fp8_block": (meta(hidden, e4m3), torch.empty(hidden // 128, rows, device="meta")),
            "fp8_tensor": (meta(hidden, e4m3), None),
            "nvfp4": (meta(hidden // 2, torch.uint8), meta(hidden // 16, e4m3)),
            "mxfp8": (meta(hidden, e4m3), meta(hidden // 32, e4m3)),
        }
        if self.ids == "logits":
            how = arguments.from_logits(kernel_routing(layer), meta(shard.num_physical, torch.float32), None)
        else:
            ids = meta(top_k, torch.int32)
            how = arguments.routed(layer, ids if self.ids == "packed" else (ids, meta(top_k, torch.float32)))
        call = record_call(
            fmt.op if self.ids == "logits" else fmt.routed_op,
            arguments.op_arguments(
                layer,
                shard,
                sizes,
                top_k=top_k,
                tune_max_num_tokens=regime.tune_max_num_tokens,
                weights=arguments.meta_weights(layer, sizes),
                activations=activations[self._activations(layer)],
                output=meta(hidden, torch.bfloat16),
                routing=how,
                fp8_block_layout=self.fp8_block_layout,
            ),
        )
        return Candidates(enumerate_tactics(call.valid_tactics, equivalent_rows(routing, shard.num_local)))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """`[-1, -1]`: the launcher's own choice."""
        from moetune.backends.flashinfer_trtllm.enumeration import DEFAULT_TACTIC

        return DEFAULT_TACTIC

    def tolerance(self, layer: MoELayer) -> float:
        """2e-2 where activations are bf16, 8e-2 where they are e4m3, 0.2 where they are e2m1."""
        return INTERMEDIATE_TOLERANCES[self._activations(layer)]

    def prepare(self, problem: Problem) -> TrtllmRunner:
        """Random weights, kept for the next bucket's problem of the same rank; inputs; a recorded call for each draw.

        Raises:
            UnsupportedError: this layer is not computed, or the installed FlashInfer's ops have other parameters.
        """
        import torch

        from moetune.backends.flashinfer_trtllm.runner import TrtllmRunner
        from moetune.backends.flashinfer_trtllm.weights import Weights

        layer, regime = problem.layer, problem.regime
        self._check(layer, regime)
        sizes, activations = self._sizes(layer, regime, problem.shard.num_local), self._activations(layer)
        weights = self._weights.get(
            problem, lambda: Weights(layer, activations, sizes, regime.seed, problem.device, self.fp8_block_layout)
        )
        quantized = regime.dispatch != "none" if self.quantized is None else self.quantized
        dtype: torch.dtype = getattr(torch, self.hidden_dtype)
        return TrtllmRunner(problem, weights, ids=self.ids, quantized=quantized, hidden_dtype=dtype)

    def _check(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")

    def _activations(self, layer: MoELayer) -> Activations:
        if layer.precision is Precision.MXFP4:
            return self.mxfp4_activations
        return FORMATS[layer.precision].activations[0]

    @staticmethod
    def _sizes(layer: MoELayer, regime: Regime, num_local: int | None = None) -> ExpertSizes:
        count = regime.shard(layer).num_local if num_local is None else num_local
        intermediate = regime.intermediate_size(layer)
        return ExpertSizes.of(FORMATS[layer.precision], count, layer.hidden_size, intermediate)


class TrtllmRoutedBackend(TrtllmBackend):
    """The op for given ids (SGLang's `flashinfer_trtllm_routed`, vLLM's modular kernels): another code path.

    Args:
        packed: ids and weights in one int32 each, or apart. mxint4 takes packed ones only.
        options: as `TrtllmBackend`'s.

    Raises:
        UsageError: no such value.
    """

    name: ClassVar[str] = "flashinfer-trtllm-routed"

    def __init__(
        self,
        *,
        packed: bool = True,
        mxfp4_activations: Activations = "bf16",
        quantized: bool | None = None,
        fp8_block_layout: Fp8BlockLayout = "blocked",
        hidden_dtype: HiddenDtype = "bfloat16",
    ) -> None:
        super().__init__(
            mxfp4_activations=mxfp4_activations,
            quantized=quantized,
            fp8_block_layout=fp8_block_layout,
            hidden_dtype=hidden_dtype,
        )
        self.packed = packed

    @property
    def ids(self) -> Ids:
        """How calls are routed."""
        return "packed" if self.packed else "unpacked"

    def _routing_unsupported(self, fmt: Format, layer: MoELayer, regime: Regime) -> str | None:
        if not self.packed and not fmt.unpacked_ids:
            return f"takes packed ids only for {layer.precision.value} experts"
        if layer.top_k > _ROUTED_TOP_K:
            return f"routes to {_ROUTED_TOP_K} experts at most, not {layer.top_k}"
        return None
