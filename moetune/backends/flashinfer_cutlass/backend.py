"""Defines `FlashInferCutlassBackend`, which tunes FlashInfer's `cutlass_fused_moe`. vLLM and SGLang offer this kernel.

A tactic is a pair of kernels, one for each GEMM: `{"gemm1": a, "gemm2": b}`, which is the op's `profile_ids=[a, b]`.
FlashInfer's own autotuner times each GEMM alone, always with a routing over all experts. Here the whole op is timed
with the regime's routing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Candidates, Problem
from moetune.backends.flashinfer_cutlass.formats import (
    FORMATS,
    OPTIONS,
    Bf16,
    Caller,
    Format,
    Mxfp4Activations,
    format_of,
)
from moetune.backends.flashinfer_cutlass.op import ACTIVATIONS, lacking, version
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError, UsageError
from moetune.quoting import quoted
from moetune.search.base import Search
from moetune.search.coordinate import coordinate, promising
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import UNTUNED, Tactic

if TYPE_CHECKING:
    from moetune.backends.flashinfer_cutlass.experts import CutlassExperts
    from moetune.backends.flashinfer_cutlass.runner import CutlassRunner

DEFAULT_TACTIC = Tactic(gemm1=UNTUNED, gemm2=UNTUNED)
"""The op's own default: the first tactic of each GEMM."""
ROUNDS = (1, 4, 8)
"""How often the search times a tactic in each of its passes; see `coordinate`."""
MIXED_INPUT = (9, 0)
"""The compute capability whose kernels take weights of 4 bits with activations of 8 or 16."""
FINAL_S = 0.06
"""About how long one bucket's final comparison takes in seconds, if the runs are short.

It is chosen so that a tune takes no longer than FlashInfer's own autotuner: 16 to 36 s for the 21 buckets up to 8192
rows. On an H200 a tune took 21.8 s for packed rows of Qwen3-235B on 4 ranks, FlashInfer 26.6 s (commit b96b5be).
"""

_OTHERS = {
    Precision.FP8_BLOCK: "FlashInfer's kernels for fp8_block have nothing to tune; flashinfer-fp8-block times them",
    Precision.MXINT4: "FlashInfer's kernels for int4 have groups of 128 values, those of mxint4 have 32",
    Precision.INT4_G128: "FlashInfer multiplies int4 in groups of 128 with e4m3 only, which is w4a8, not with bf16",
}
"""Why some precisions are not tuned, where more can be said than that."""


class FlashInferCutlassBackend(Backend):
    """Tunes FlashInfer's CUTLASS MoE op from compute capability 9.0, on 9.0 with mixed input too: mxfp4 and w4a8.

    Args:
        mxfp4_activations: what mxfp4 weights are multiplied with: `bf16`, or `fp8` with a scale a row that the kernel
            finds itself (SGLang's `--flashinfer-mxfp4-moe-precision fp8`).
        caller: the engine whose call of the op is computed, `vllm` or `sglang`. SGLang adds up a row's slots in another
            kernel and pads H of mxfp4 experts otherwise, so there are other tactics.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    name = "flashinfer-cutlass"
    modules = ("moetune.backends.flashinfer_cutlass.runner", "moetune.backends.flashinfer_cutlass.tactics")
    final_s = FINAL_S
    warms_once = True

    def __init__(self, *, mxfp4_activations: Mxfp4Activations = "bf16", caller: Caller = "vllm") -> None:
        self._options = {"mxfp4_activations": str(mxfp4_activations), "caller": str(caller)}
        for option, value in self._options.items():
            if value not in OPTIONS[option]:
                raise UsageError(f"{option} must be one of {', '.join(OPTIONS[option])}; given {quoted(value)}.")
        self._candidates: dict[tuple[str, int, int, str], Candidates] = {}
        self._weights: WeightCache[CutlassExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if FlashInfer, its `profile_ids`, a suitable GPU or its module is missing."""
        return lacking("profile_ids", "the argument that names a tactic")

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why it cannot be tuned: its rows, precision, activation, sizes, input weights or shards."""
        if reason := self.other_rows(regime):
            return reason
        fmt = format_of(layer.precision, **self._options)
        if fmt is None:
            default = f"tunes {', '.join(FORMATS)} experts, not {layer.precision.value}"
            return _OTHERS.get(layer.precision, default)
        if layer.activation not in ACTIVATIONS:
            return f"tunes {', '.join(ACTIVATIONS)}, not {layer.activation.value}"
        if layer.weight_on_input and layer.top_k > 1:
            return "applies the router's weight to an expert's output; rows come multiplied with it at top_k = 1 only"
        if (layer.num_experts + regime.redundant_experts) % regime.ep_size:
            return "the op computes a rank's first expert as rank · L, so all shards must be equal"
        intermediate, multiple = regime.intermediate_size(layer), fmt.multiple
        if layer.hidden_size % multiple or intermediate % multiple:
            return f"H = {layer.hidden_size} and I/tp = {intermediate} must be multiples of {multiple}"
        return None

    def environment(self) -> dict[str, str]:
        """Returns FlashInfer's version, because a tactic is a position in a list that is compiled into FlashInfer.

        Options have a field only if they differ from the default, so that profiles keep answering that were measured
        before there were options.
        """
        changed = {name: value for name, value in self._options.items() if value != OPTIONS[name][0]}
        return {"flashinfer": version(), **changed}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns every pair of the two GEMMs' tactics that the device can run, with `DEFAULT_TACTIC` first.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        fmt = self._require(layer, regime)
        key = layer.digest, regime.intermediate_size(layer), regime.row_top_k(layer), device
        if key not in self._candidates:
            from moetune.backends.flashinfer_cutlass.tactics import gemm_tactics

            reason = _NOT_FITTING if fmt.mixed else _TOO_BIG
            first, second = gemm_tactics(layer, regime, fmt, device)
            pairs = (Tactic(gemm1=a, gemm2=b) for a in first.runnable for b in second.runnable)
            excluded = {Tactic(gemm1=a): reason for a in first.unsuitable}
            excluded |= {Tactic(gemm2=b): reason for b in second.unsuitable}
            self._candidates[key] = Candidates((DEFAULT_TACTIC, *pairs), excluded)
        return self._candidates[key]

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns `DEFAULT_TACTIC`, which the op runs if FlashInfer's autotuner has no entry."""
        return DEFAULT_TACTIC

    def search(self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]) -> Search:
        """Returns a coordinate descent; see `coordinate`.

        It tries GEMM1's tactics with one good tactic of GEMM2, then GEMM2's tactics with the best tactic of GEMM1. If
        there are `warm_starts`, it tries only the values in them and a few others.
        """
        turn = bisect_left(problem.regime.buckets, problem.rows)
        return coordinate(candidates.tactics, starts=warm_starts, rounds=ROUNDS, turn=turn)

    def promising(self, times_us: Mapping[Tactic, float]) -> Sequence[Tactic]:
        """Returns the tactics near the best of their line in one bucket; see `coordinate.promising`."""
        return promising(times_us)

    def tolerance(self, layer: MoELayer) -> float:
        """Returns that of the format: 1e-2 with bf16 activations, 5e-2 where the intermediate is rounded to e4m3."""
        fmt = format_of(layer.precision, **self._options)
        return Bf16.tolerance if fmt is None else fmt.tolerance

    def prepare(self, problem: Problem) -> CutlassRunner:
        """Puts inputs, routings and workspace on the device. Weights are kept for the next bucket.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        fmt = self._require(problem.layer, problem.regime)
        from moetune.backends.flashinfer_cutlass.experts import CutlassExperts
        from moetune.backends.flashinfer_cutlass.runner import CutlassRunner

        return CutlassRunner(problem, self._weights.get(problem, lambda: CutlassExperts(problem, fmt)))

    def _require(self, layer: MoELayer, regime: Regime) -> Format:
        """Returns the layer's format.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        fmt = format_of(layer.precision, **self._options)
        if (reason := self.unsupported(layer, regime)) or fmt is None:
            raise UnsupportedError(f"The backend {self.name}: {reason}.", "Use another backend.")
        if obstacle := self.unavailable():
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        import torch

        if fmt.mixed and torch.cuda.get_device_capability() != MIXED_INPUT:
            raise UnsupportedError(
                f"The backend {self.name} cannot run {layer.precision.value} experts here: its kernels for mixed input "
                "need compute capability 9.0.",
                "Use another backend.",
            )
        return fmt


_TOO_BIG = "needs more shared memory than the device has"
_NOT_FITTING = "needs more shared memory than the device has, or its tile does not divide this GEMM's sizes"
