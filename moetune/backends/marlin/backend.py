"""Defines `MarlinBackend`, which tunes Marlin's MoE kernel with the weights of 4 bits that vLLM and SGLang serve.

A tactic is one block size for both GEMMs and a tile for each, `{"block_size_m": 16, "gemm1": "auto", "gemm2":
"64x128x2"}`; see `space`. The engines choose the block size by a formula, and leave the tiles to the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from moetune.backends.base import Backend, Candidates, Default, Problem
from moetune.backends.device import Device, without_device
from moetune.backends.marlin import op, space
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.formulas import Formula, block_size_m
from moetune.backends.marlin.search import marlin_search
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError, UsageError
from moetune.search.base import Search
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.marlin.runner import MarlinRunner
    from moetune.backends.marlin.weights import MarlinExperts

TOLERANCE = 1e-2
"""As of the bf16 kernels: weights are rounded to bf16 when they are scaled, and so are both GEMMs' outputs."""
ACTIVATIONS = (Activation.SILU, Activation.GELU, Activation.SWIGLU_CLAMPED, Activation.SILU_CLAMPED)
_SOURCES = {"vllm": "the formula of vLLM 0.26 … 0.33", "sglang": "the formula of SGLang 0.5.23"}


class MarlinBackend(Backend):
    """Tunes vLLM's `moe_wna16_marlin_gemm` for int4, mxfp4 and nvfp4 weights, from compute capability 8.0.

    Args:
        formula: the engine whose formula gives the default's block size, `vllm` or `sglang`. For SGLang, only block
            sizes are tuned.

    Raises:
        UsageError: there is no such formula.
    """

    name = "marlin"
    warms_once = True
    modules = ("moetune.backends.marlin.runner", "moetune.backends.marlin.weights")

    def __init__(self, formula: Formula = "vllm") -> None:
        if formula not in get_args(Formula):
            raise UsageError(f"Unknown formula {formula!r}.", f"Formulas: {', '.join(get_args(Formula))}.")
        self.formula = formula
        self._weights: WeightCache[MarlinExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if vLLM's library, Triton or a suitable GPU is missing."""
        if op.library() is None:
            return "vLLM's library of MoE kernels is not installed", "pip install vllm"
        import triton  # noqa: F401  its absence is an ImportError, which the registry reports

        needs = "needs compute capability 8.0 for bf16"
        return without_device(lambda found: found >= (8, 0), needs, "Use another GPU.") or op.load()

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why the layer cannot be tuned: its precision, activation, biases, sizes or weights on the input."""
        if reason := self.other_rows(regime):
            return reason
        fmt = FORMATS.get(layer.precision)
        if fmt is None:
            return f"tunes {', '.join(FORMATS)} experts, not {layer.precision.value}"
        if layer.activation not in ACTIVATIONS:
            return f"tunes {', '.join(ACTIVATIONS)}, not {layer.activation.value}"
        if layer.weight_on_input:
            return "applies the router's weight to an expert's output, this layer to its input"
        if layer.expert_bias and fmt.scale == "e4m3":
            return "scales nvfp4 experts after adding their biases, so it tunes nvfp4 without biases only"
        hidden, intermediate = layer.hidden_size, regime.intermediate_size(layer)
        if fmt.padded(hidden, intermediate) is None:
            return (
                f"needs H in multiples of 128 and H and I/tp in multiples of {fmt.group} for {fmt.name}; "
                f"H = {hidden}, I/tp = {intermediate}"
            )
        return None

    def environment(self) -> dict[str, str]:
        """Returns vLLM's version, whose library has the kernel, and the default's formula."""
        return {"vllm": op.version(), "formula": self.formula}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns every block size with every pair of tiles that the device can run, the default first.

        For SGLang it returns the block sizes alone, because the function that calls its kernel takes no tiles.

        Raises:
            UnsupportedError: this layer is not computed.
        """
        self._require(layer, regime)
        default = self.default(layer, regime, rows)
        if self.formula == "sglang":
            return space.block_sizes(default)
        both = space.gemms(layer, regime, FORMATS[layer.precision])
        return space.candidates(both, default, Device.of(device))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the block size of the engine's formula, with the kernel's own tiles."""
        shard = regime.shard(layer)
        top_k = regime.row_top_k(layer)
        return space.tactic_of(block_size_m(self.formula, rows, top_k, shard.num_local, shard.num_physical))

    def explained_default(self, layer: MoELayer, regime: Regime, rows: int) -> Default:
        """Returns the default and whose formula it is."""
        return Default(self.default(layer, regime, rows), _SOURCES[self.formula])

    def search(self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]) -> Search:
        """Returns a search of the block sizes, then of the tiles of each GEMM; see `marlin_search`."""
        return marlin_search(candidates.tactics, warm_starts)

    def tolerance(self, layer: MoELayer) -> float:
        """Returns `TOLERANCE`, against a reference that multiplies the weights as stored."""
        return TOLERANCE

    def prepare(self, problem: Problem) -> MarlinRunner:
        """Puts weights, inputs, routings and all workspace on the device. Weights are kept for the next bucket.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        self._require(problem.layer, problem.regime)
        if obstacle := self.unavailable():
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        from moetune.backends.marlin.runner import MarlinRunner
        from moetune.backends.marlin.weights import random_experts

        runner = MarlinRunner(problem, self._weights.get(problem, lambda: random_experts(problem)))
        self._load_kernels(runner, problem)
        return runner

    def _load_kernels(self, runner: MarlinRunner, problem: Problem) -> None:
        """Runs the default, so that no first run of a tactic and no graph has to load kernels.

        vLLM's wheels have Marlin for Hopper as PTX. The driver compiles all kernels of a format when it loads the first
        one, unless they are in its cache on disk: ptxas 13.0 needs 126 s for int4 and 50 s for the fp4 formats on one
        core. A preparation may take that long, a tactic's first run may not.
        """
        import torch

        runner.run(self.default(problem.layer, problem.regime, problem.rows))
        if torch.device(problem.device).type == "cuda":
            torch.cuda.synchronize(problem.device)

    def _require(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")
