"""Defines `HummingBackend`, which tunes Humming's MoE kernels with weights of 4 bits on Hopper.

A tactic is a configuration for each GEMM, `{"gemm1": "wgmma-64x256x64-64x32x64-s4-b1-producer-streamk", "gemm2":
"auto"}`; see `config`. vLLM takes the configurations from Humming's heuristic, by its estimate of the rank's slots.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from moetune.backends.base import Backend, Candidates, Default, Problem
from moetune.backends.device import Device, without_device
from moetune.backends.humming import package, space
from moetune.backends.humming.config import Config
from moetune.backends.humming.gemm import Gemm, gemms
from moetune.backends.humming.layer_fields import layer_fields
from moetune.backends.humming.search import humming_search, lines
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError
from moetune.search.base import Search
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.humming.runner import HummingExperts, HummingRunner

TOLERANCE = 1e-2
"""As of the bf16 kernels: weights are rounded to bf16 when they are scaled, and so are both GEMMs' outputs."""
ACTIVATIONS = (Activation.SILU, Activation.GELU, Activation.SWIGLU_CLAMPED, Activation.SILU_CLAMPED)
CAPABILITY = (9, 0)
"""Where vLLM prefers Humming to Marlin (`quantization/utils/humming/priority.py`), and what `gemm` knows."""


class HummingBackend(Backend):
    """Tunes the MoE kernels of humming-kernels 0.1.19 for int4, mxfp4 and nvfp4 weights on compute capability 9.0."""

    name = "humming"
    warms_once = True
    modules = ("moetune.backends.humming.runner", "moetune.backends.humming.ops")

    def __init__(self) -> None:
        self._weights: WeightCache[HummingExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if Humming, its compiler, Triton or a Hopper GPU is missing."""
        import triton  # noqa: F401  its absence is an ImportError, which the registry reports

        needs, hint = "tunes for compute capability 9.0", "Use an H100, H200 or H20."
        return (
            package.missing()
            or without_device(lambda found: found == CAPABILITY, needs, hint)
            or package.without_compiler()
        )

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why the layer cannot be tuned: its rows, precision, activation, sizes or weights on the input."""
        if reason := self.other_rows(regime):
            return reason
        fmt = FORMATS.get(layer.precision)
        if fmt is None:
            return f"tunes {', '.join(FORMATS)} experts, not {layer.precision.value}"
        if layer.activation not in ACTIVATIONS:
            return f"tunes {', '.join(ACTIVATIONS)}, not {layer.activation.value}"
        if layer.weight_on_input:
            return "applies the router's weight to an expert's output, this layer to its input"
        hidden, intermediate = layer.hidden_size, regime.intermediate_size(layer)
        if hidden % fmt.group or intermediate % fmt.group:
            return f"needs H and I/tp in multiples of {fmt.group} for {fmt.name}; H = {hidden}, I/tp = {intermediate}"
        return None

    def environment(self) -> dict[str, str]:
        """Returns the version of humming-kernels, which decides the kernels' code and the heuristic."""
        return {"humming": package.version()}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns every pair of configurations that the device can run, the default first.

        Raises:
            UnsupportedError: this layer is not computed.
        """
        self._require(layer, regime)
        return space.candidates(gemms(layer, regime), Device.of(device))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the tactic in which Humming's heuristic chooses for both GEMMs."""
        return space.tactic_of()

    def explained_default(self, layer: MoELayer, regime: Regime, rows: int) -> Default:
        """Returns the default, and for how many slots the heuristic chooses."""
        from moetune.backends.humming.formulas import estimated_slots

        slots = estimated_slots(layer, regime, rows)
        source = f"Humming's heuristic for {slots} slots, which vLLM 0.33 estimates"
        return Default(self.default(layer, regime, rows), source)

    def search(self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]) -> Search:
        """Returns a search of each GEMM's configurations, then of the best together; see `humming_search`."""
        return humming_search(candidates.tactics, warm_starts)

    def likely(self, problem: Problem, candidates: Candidates) -> Sequence[Tactic]:
        """Returns the tactics of the search's first batch."""
        return lines(candidates.tactics)

    def tolerance(self, layer: MoELayer) -> float:
        """Returns `TOLERANCE`, against a reference that multiplies the weights as stored."""
        return TOLERANCE

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> Sequence[Hashable]:
        """Returns a key for each GEMM with a configuration of its own. The code does not depend on the rows."""
        return [(gemm, config) for gemm, config in _kernels(layer, regime, tactic)]

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        """Compiles the kernel of one key into Humming's cache; see `package.compile_kernel`."""
        gemm, config = _kernels(layer, regime, tactic)[part]
        fields: dict[str, Any] = {"gemm_type": gemm.type, **config.fields(gemm.type)}
        package.compile_kernel(layer_fields(gemm, capability) | fields, capability)

    def prepare(self, problem: Problem) -> HummingRunner:
        """Puts weights, inputs, routings and all workspace on the device. Weights are kept for the next bucket.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the kernels.
        """
        self._require(problem.layer, problem.regime)
        if obstacle := self.unavailable():
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        from moetune.backends.humming.ops import HummingOps
        from moetune.backends.humming.runner import HummingExperts, HummingRunner
        from moetune.backends.humming.weights import random_experts

        ops = HummingOps(problem.device)
        made = self._weights.get(problem, lambda: HummingExperts.of(problem, random_experts(problem), ops))
        runner = HummingRunner(problem, made, ops)
        # compiles the heuristic's kernels and those of the activation, which may take longer than a tactic's first run
        runner.run(self.default(problem.layer, problem.regime, problem.rows))
        return runner

    def _require(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")


def _kernels(layer: MoELayer, regime: Regime, tactic: Tactic) -> list[tuple[Gemm, Config]]:
    """Returns the GEMMs with a configuration of their own. What the heuristic chooses is compiled by `prepare`."""
    return [
        (gemm, Config.parse(str(tactic[name])))
        for name, gemm in zip(space.GEMMS, gemms(layer, regime), strict=True)
        if tactic[name] != space.AUTO
    ]
