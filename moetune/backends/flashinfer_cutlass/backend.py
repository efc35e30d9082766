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
from moetune.backends.flashinfer_cutlass.op import ACTIVATIONS, ALIGNMENTS, lacking, version
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError
from moetune.search.base import Search
from moetune.search.coordinate import coordinate, promising
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import UNTUNED, Tactic

if TYPE_CHECKING:
    from moetune.backends.flashinfer_cutlass.runner import CutlassExperts, CutlassRunner

DEFAULT_TACTIC = Tactic(gemm1=UNTUNED, gemm2=UNTUNED)
"""The op's own default: the first tactic of each GEMM."""
ROUNDS = (1, 4, 8)
"""How often the search times a tactic in each of its passes; see `coordinate`."""
FINAL_S = 0.06
"""About how long one bucket's final comparison takes in seconds, if the runs are short.

It is chosen so that a tune takes no longer than FlashInfer's own autotuner: 16 to 36 s for the 21 buckets up to 8192
rows. On an H200 a tune took 21.8 s for packed rows of Qwen3-235B on 4 ranks, FlashInfer 26.6 s (commit b96b5be).
"""

_TOLERANCES = {Precision.BF16: 1e-2, Precision.FP8_TENSOR: 5e-2}


class FlashInferCutlassBackend(Backend):
    """Tunes FlashInfer's CUTLASS MoE op in bf16, and in fp8 with one scale a tensor, from compute capability 9.0."""

    name = "flashinfer-cutlass"
    modules = ("moetune.backends.flashinfer_cutlass.runner",)
    final_s = FINAL_S
    warms_once = True

    def __init__(self) -> None:
        self._able = False
        self._candidates: dict[tuple[Precision, str], Candidates] = {}
        self._weights: WeightCache[CutlassExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if FlashInfer, its `profile_ids`, a suitable GPU or its module is missing."""
        return lacking("profile_ids", "the argument that names a tactic")

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why it cannot be tuned: its rows, precision, activation, biases, sizes, input weights or shards."""
        if reason := self.other_rows(regime):
            return reason
        if layer.precision is Precision.FP8_BLOCK:
            return "FlashInfer's kernels for fp8_block experts have nothing to tune; flashinfer-fp8-block times them"
        if layer.precision not in ALIGNMENTS:
            return f"tunes {' and '.join(ALIGNMENTS)} experts, not {layer.precision.value}"
        if layer.activation not in ACTIVATIONS:
            return f"tunes {' and '.join(ACTIVATIONS)}, not {layer.activation.value}"
        if layer.expert_bias:
            return "tunes experts without biases"
        if layer.weight_on_input:
            return "applies the router's weight to an expert's output, this layer to its input"
        if (layer.num_experts + regime.redundant_experts) % regime.ep_size:
            return "the op computes a rank's first expert as rank · L, so all shards must be equal"
        intermediate, multiple = regime.intermediate_size(layer), ALIGNMENTS[layer.precision]
        if layer.hidden_size % multiple or intermediate % multiple:
            return f"H = {layer.hidden_size} and I/tp = {intermediate} must be multiples of {multiple}"
        return None

    def environment(self) -> dict[str, str]:
        """Returns FlashInfer's version. A tactic is a position in a list that is compiled into FlashInfer."""
        return {"flashinfer": version()}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns every pair of the two GEMMs' tactics that the device can run, with `DEFAULT_TACTIC` first.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        self._require(layer, regime)
        key = layer.precision, device
        if key not in self._candidates:
            from moetune.backends.flashinfer_cutlass.runner import gemm_tactics

            first, second = gemm_tactics(layer, regime, device)
            pairs = (Tactic(gemm1=a, gemm2=b) for a in first.runnable for b in second.runnable)
            excluded = {Tactic(gemm1=a): _TOO_BIG for a in first.too_big}
            excluded |= {Tactic(gemm2=b): _TOO_BIG for b in second.too_big}
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
        """Returns 1e-2 in bf16 and 5e-2 in fp8, where the intermediate is rounded to e4m3."""
        return _TOLERANCES[layer.precision]

    def prepare(self, problem: Problem) -> CutlassRunner:
        """Puts inputs, routings and workspace on the device. Weights are kept for the next bucket.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        self._require(problem.layer, problem.regime)
        from moetune.backends.flashinfer_cutlass.runner import CutlassRunner, random_experts

        return CutlassRunner(problem, self._weights.get(problem, lambda: random_experts(problem)))

    def _require(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name}: {reason}.", "Use another backend.")
        if not self._able and (obstacle := self.unavailable()):
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        self._able = True


_TOO_BIG = "needs more shared memory than the device has"
