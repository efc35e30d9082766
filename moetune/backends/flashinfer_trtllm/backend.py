"""Defines the two backends of FlashInfer's trtllm-gen kernels. One routes from logits, the other takes given ids."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from moetune.backends.base import Backend, Candidates, Problem
from moetune.backends.flashinfer_trtllm.formats import FORMATS, Fp8BlockLayout, format_of
from moetune.backends.flashinfer_trtllm.weight_format import ExpertSizes, Format
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import flashinfer_versions
from moetune.quoting import quoted
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.flashinfer_trtllm.runner import Ids, TrtllmRunner
    from moetune.backends.flashinfer_trtllm.weights import Weights

CAPABILITIES = ((10, 0), (10, 3))
NEEDED_VERSION = (0, 7, 2)
Mxfp4Activations = Literal["bf16", "mxfp8"]
HiddenDtype = Literal["bfloat16", "float16", "float32"]
_ROUTED_TOP_K = 32
_ARRIVES_QUANTIZED = {None: "where tokens travel", True: "yes", False: "no"}


class TrtllmBackend(Backend):
    """Tunes the op that routes from logits (SGLang's `flashinfer_trtllm`, vLLM's monolithic kernels).

    Args:
        mxfp4_activations: the activations that mxfp4 weights are multiplied with, `bf16` or `mxfp8`.
        quantized: whether activations arrive quantized, so that quantizing is not timed. By default they do if the
            dispatch is not `none`, because an engine quantizes tokens before it sends them.
        fp8_block_layout: the layout of DeepSeek's e4m3 experts, `blocked` as in vLLM or `plain` as in SGLang.
        hidden_dtype: the dtype of the engine's activations. The kernels write bf16; a cast to it is timed too.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    name = "flashinfer-trtllm"
    modules = ("moetune.backends.flashinfer_trtllm.runner",)

    def __init__(
        self,
        *,
        mxfp4_activations: Mxfp4Activations = "bf16",
        quantized: bool | None = None,
        fp8_block_layout: Fp8BlockLayout = "blocked",
        hidden_dtype: HiddenDtype = "bfloat16",
    ) -> None:
        for option, value, allowed in (
            ("mxfp4_activations", mxfp4_activations, get_args(Mxfp4Activations)),
            ("hidden_dtype", hidden_dtype, get_args(HiddenDtype)),
            ("fp8_block_layout", fp8_block_layout, get_args(Fp8BlockLayout)),
        ):
            if value not in allowed:
                raise UsageError(f"{option} must be one of {', '.join(allowed)}; given {quoted(value)}.")
        self.mxfp4_activations = mxfp4_activations
        self.fp8_block_layout = fp8_block_layout
        self.quantized = quantized
        self.hidden_dtype = hidden_dtype
        self._weights: WeightCache[Weights] = WeightCache()

    @property
    def ids(self) -> Ids:
        """How a call is routed."""
        return "logits"

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if FlashInfer 0.7.2 or a device of compute capability 10.0 or 10.3 is missing."""
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
        """Returns why it is not computed: rows, precision, sizes, activation, biases, input weights or routing."""
        if reason := self.other_rows(regime):
            return reason
        fmt = FORMATS.get(layer.precision)
        if fmt is None:
            return f"computes {', '.join(FORMATS)} experts, not {layer.precision.value}"
        lacking = fmt.unsupported(layer, regime.intermediate_size(layer))
        return lacking or self._routing_unsupported(fmt, layer, regime)

    def _routing_unsupported(self, fmt: Format, layer: MoELayer, regime: Regime) -> str | None:
        from moetune.backends.flashinfer_trtllm.logits import kernel_routing

        if regime.redundant_experts:
            return "cannot route from logits to redundant experts; use flashinfer-trtllm-routed"
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
        """Returns FlashInfer's version and the options, because each of them changes what is timed."""
        return {
            "flashinfer": flashinfer_versions.version() or "unknown",
            "ids": self.ids,
            "mxfp4_activations": self.mxfp4_activations,
            "arrives_quantized": _ARRIVES_QUANTIZED[self.quantized],
            "fp8_block_layout": self.fp8_block_layout,
            "hidden_dtype": self.hidden_dtype,
        }

    @classmethod
    def options_in(cls, environment: Mapping[str, str]) -> dict[str, Any]:
        """Returns the arguments of the class with which a backend has the fields of this strict environment."""
        spelled = {text: quantized for quantized, text in _ARRIVES_QUANTIZED.items()}
        given = spelled.get(environment.get("arrives_quantized", ""))
        packed = {"packed": environment.get("ids") == "packed"} if "packed" in inspect.signature(cls).parameters else {}
        return {**super().options_in(environment), "quantized": given, **packed}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns the default and the tactics that FlashInfer's runner enumerates at `rows` and at the real load.

        Raises:
            UnsupportedError: the backend does not compute this layer.
        """
        import torch

        from moetune.backends.flashinfer_trtllm import arguments
        from moetune.backends.flashinfer_trtllm.call import record_call
        from moetune.backends.flashinfer_trtllm.enumeration import enumerate_tactics, equivalent_rows
        from moetune.backends.flashinfer_trtllm.logits import kernel_routing
        from moetune.workload.routing import realize

        self._check(layer, regime)
        fmt, shard, routing = self._format(layer), regime.shard(layer), realize(layer, regime, rows)
        hidden, top_k = fmt.aligned(layer.hidden_size), regime.row_top_k(layer)

        def meta(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=dtype, device="meta")

        if self.ids == "logits":
            how = arguments.from_logits(kernel_routing(layer), meta(shard.num_physical, torch.float32), None)
        else:
            ids = meta(top_k, torch.int32)
            how = arguments.routed(ids if self.ids == "packed" else (ids, meta(top_k, torch.float32)))
        call = record_call(
            fmt.op if self.ids == "logits" else fmt.routed_op,
            arguments.op_arguments(
                fmt,
                layer,
                regime,
                shard,
                weights=fmt.meta_weights(shard.num_local),
                activations=fmt.activations.meta(rows, hidden),
                output=meta(hidden, torch.bfloat16),
                routing=how,
            ),
        )
        return Candidates(enumerate_tactics(call.valid_tactics, equivalent_rows(routing, shard.num_local)))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns `[-1, -1]`, the launcher's own choice."""
        from moetune.backends.flashinfer_trtllm.enumeration import DEFAULT_TACTIC

        return DEFAULT_TACTIC

    def tolerance(self, layer: MoELayer) -> float:
        """Returns 2e-2 for bf16 activations, 8e-2 for e4m3 and 0.2 for e2m1."""
        return self._format(layer).activations.tolerance

    def prepare(self, problem: Problem) -> TrtllmRunner:
        """Makes inputs and records a call for each draw. Random weights are kept for the rank's next bucket.

        Raises:
            UnsupportedError: the backend does not compute this layer, or FlashInfer's ops have other parameters.
        """
        import torch

        from moetune.backends.flashinfer_trtllm.runner import TrtllmRunner
        from moetune.backends.flashinfer_trtllm.weights import Weights

        layer, regime = problem.layer, problem.regime
        self._check(layer, regime)
        fmt, sizes = self._format(layer), self._sizes(layer, regime, problem.shard.num_local)
        weights = self._weights.get(problem, lambda: Weights(layer, fmt, sizes, regime.seed, problem.device))
        quantized = regime.dispatch != "none" if self.quantized is None else self.quantized
        dtype: torch.dtype = getattr(torch, self.hidden_dtype)
        return TrtllmRunner(problem, weights, ids=self.ids, quantized=quantized, hidden_dtype=dtype)

    def _check(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")

    def _format(self, layer: MoELayer) -> Format:
        return format_of(layer.precision, self.mxfp4_activations, self.fp8_block_layout)

    @staticmethod
    def _sizes(layer: MoELayer, regime: Regime, num_local: int | None = None) -> ExpertSizes:
        count = regime.shard(layer).num_local if num_local is None else num_local
        intermediate = regime.intermediate_size(layer)
        return ExpertSizes.of(FORMATS[layer.precision], count, layer.hidden_size, intermediate)


class TrtllmRoutedBackend(TrtllmBackend):
    """Tunes the op that takes given ids (SGLang's `flashinfer_trtllm_routed`, vLLM's modular kernels).

    Args:
        packed: whether an id and its weight are packed into one int32, or are in separate tensors. mxint4 experts
            take packed ids only.
        mxfp4_activations: see `TrtllmBackend`.
        quantized: see `TrtllmBackend`.
        fp8_block_layout: see `TrtllmBackend`.
        hidden_dtype: see `TrtllmBackend`.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    name = "flashinfer-trtllm-routed"

    def __init__(
        self,
        *,
        packed: bool = True,
        mxfp4_activations: Mxfp4Activations = "bf16",
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
        """How a call is routed."""
        return "packed" if self.packed else "unpacked"

    def _routing_unsupported(self, fmt: Format, layer: MoELayer, regime: Regime) -> str | None:
        if not self.packed and not fmt.unpacked_ids:
            return f"takes packed ids only for {layer.precision.value} experts"
        if layer.top_k > _ROUTED_TOP_K:
            return f"routes to {_ROUTED_TOP_K} experts at most, not {layer.top_k}"
        return None
