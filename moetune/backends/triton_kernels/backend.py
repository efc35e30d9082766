"""Defines `TritonKernelsBackend`, which tunes the kernels with which vLLM runs gpt-oss on Hopper.

A tactic has block_m, block_k, num_stages and split_k for each GEMM, `{"gemm1": "16x128x4x1", "gemm2": "16x64x6x1"}`;
see `space`. vLLM leaves them to triton_kernels' own formula.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Candidates, Default, Problem
from moetune.backends.device import Device, without_device
from moetune.backends.prepared import WeightCache
from moetune.backends.triton_kernels import package, space
from moetune.backends.triton_kernels.formulas import engine_flags
from moetune.errors import UnsupportedError
from moetune.search.base import Search
from moetune.search.coordinate import coordinate, promising
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.triton_kernels.runner import KernelsRunner
    from moetune.backends.triton_kernels.weights import KernelExperts

TOLERANCE = 1e-2
"""As of the bf16 kernels: mxfp4 weights are exact in bf16. Rounded to bf16 are the inputs, the activation's result, the
router's weights, each slot's product and the output."""
ROUNDS = (1, 4, 8)
"""How often the search times a tactic in each of its passes; see `coordinate`."""


class TritonKernelsBackend(Backend):
    """Tunes `matmul_ogs` of triton_kernels (Triton 3.5.1, in vLLM) for mxfp4 weights and bf16 activations on Hopper."""

    name = "triton-kernels"
    modules = ("moetune.backends.triton_kernels.runner", "moetune.backends.triton_kernels.ahead")

    def __init__(self) -> None:
        self._weights: WeightCache[KernelExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if triton_kernels of a known version, Triton or a Hopper GPU is missing."""
        if found := package.obstacle():
            return found
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed", "pip install 'moetune[triton]'"
        return without_device(lambda found: found[0] == 9, "needs compute capability 9.0", "Use an H100 or H200.")

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why the layer cannot be tuned: its precision, activation, sizes, top-k or weights on the input."""
        if reason := self.other_rows(regime):
            return reason
        if layer.precision is not Precision.MXFP4:
            return f"tunes mxfp4 experts, not {layer.precision.value}"
        if layer.activation is not Activation.SWIGLU_CLAMPED:
            return f"tunes swiglu_clamped, which the first GEMM applies, not {layer.activation.value}"
        if layer.weight_on_input:
            return "applies the router's weight to an expert's output, this layer to its input"
        if (top_k := regime.row_top_k(layer)).bit_count() != 1:
            return f"sorts slots for a top-k that is a power of two, not {top_k}"
        narrow = min(gemm.N for gemm in space.gemms(layer, regime, 1)) <= space.LEAST_N
        if layer.hidden_size % space.MULTIPLE or narrow:
            return (
                f"needs H in multiples of {space.MULTIPLE} and more than {space.LEAST_N} columns in each GEMM; "
                f"H = {layer.hidden_size}, I/tp = {regime.intermediate_size(layer)}"
            )
        return None

    def environment(self) -> dict[str, str]:
        """Returns Triton's version, and a digest of triton_kernels' sources, which have no version."""
        return {"triton": importlib.metadata.version("triton"), "kernel_source": package.digest()}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns every pair of flags that the device can run, the default first.

        Raises:
            UnsupportedError: this layer is not computed.
        """
        self._require(layer, regime)
        default = self.default(layer, regime, rows)
        return space.candidates(space.gemms(layer, regime, rows), default, Device.of(device))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the flags that triton_kernels chooses in vLLM, the same for both GEMMs."""
        flags = engine_flags(rows * regime.row_top_k(layer), regime.shard(layer).num_local)
        return space.tactic_of(flags, flags)

    def explained_default(self, layer: MoELayer, regime: Regime, rows: int) -> Default:
        """Returns the default and whose formula it is."""
        return Default(self.default(layer, regime, rows), "the formula of triton_kernels in vLLM 0.26 … 0.33")

    def likely(self, problem: Problem, candidates: Candidates) -> Sequence[Tactic]:
        """Returns the default, and the tactics that share the flags of one GEMM with it: a cold search times them."""
        default = candidates.tactics[0]
        return [each for each in candidates.tactics if any(each[name] == default[name] for name in default)]

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> Sequence[Hashable]:
        """Returns one key a GEMM.

        Triton compiles anew if a number of the bucket becomes 1 or a multiple of 16, or no longer is.
        """
        count = regime.shard(layer).num_local
        keys: list[Hashable] = []
        for part, gemm in enumerate(space.gemms(layer, regime, rows)):
            flags = space.Flags.parse(str(tactic[f"gemm{part + 1}"]))
            numbers = (rows, gemm.slots, gemm.blocks(flags.block_m, count))
            classes = tuple(number == 1 or number % 16 == 0 for number in numbers)
            keys.append((part, gemm.N, gemm.K, count, regime.row_top_k(layer), layer.expert_bias, flags, classes))
        return keys

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        """Compiles the first or the second GEMM into Triton's cache; see `ahead.compile_gemm`."""
        from moetune.backends.triton_kernels.ahead import compile_gemm

        compile_gemm(layer, regime, rows, space.Flags.parse(str(tactic[f"gemm{part + 1}"])), part, capability)

    def search(self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]) -> Search:
        """Returns a coordinate descent over the flags of each GEMM, from the default if nothing else is known."""
        turn = bisect_left(problem.regime.buckets, problem.rows)
        starts = warm_starts or candidates.tactics[:1]
        explore = 4 if warm_starts else 1
        return coordinate(candidates.tactics, starts=starts, explore=explore, rounds=ROUNDS, turn=turn)

    def promising(self, times_us: Mapping[Tactic, float]) -> Sequence[Tactic]:
        """Returns the tactics near the best of their line in one bucket; see `coordinate.promising`."""
        return promising(times_us)

    def tolerance(self, layer: MoELayer) -> float:
        """Returns `TOLERANCE`, against a reference that multiplies the weights as stored."""
        return TOLERANCE

    def prepare(self, problem: Problem) -> KernelsRunner:
        """Puts weights, inputs, routings and buffers on the device. Weights are kept for the next bucket.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the kernels.
        """
        self._require(problem.layer, problem.regime)
        if obstacle := self.unavailable():
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        from moetune.backends.triton_kernels.runner import KernelsRunner
        from moetune.backends.triton_kernels.weights import random_experts

        return KernelsRunner(problem, self._weights.get(problem, lambda: random_experts(problem)))

    def _require(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")
