"""`FlashInferCutlassBackend`: FlashInfer's `cutlass_fused_moe`, one of the kernels that vLLM and SGLang offer.

A tactic is a pair, one kernel for each of the two GEMMs: `{"gemm1": a, "gemm2": b}`, exactly the op's
`profile_ids=[a, b]`. FlashInfer's own autotune times each GEMM alone and always under routing over all experts; here
both are timed end to end, in the real op, under the regime's routing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import shutil
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetune.backends.base import Candidates, Problem
from moetune.errors import UnsupportedError
from moetune.search.base import Search
from moetune.search.coordinate import coordinate, promising
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.spec.words import Precision

if TYPE_CHECKING:
    from moetune.backends.flashinfer_cutlass_runner import CutlassRunner, Experts

PACKAGE = "flashinfer-python"
UNTUNED = Tactic(gemm1=-1, gemm2=-1)
"""The op's own fallback: it takes the first tactic of each GEMM."""
ALIGNMENTS = {Precision.BF16: 8, Precision.FP8_TENSOR: 16}
"""H and I/tp must be multiples: 128 bits of values, as the op demands for TMA."""
ACTIVATIONS = {Activation.SILU: "Swiglu", Activation.GELU: "GegluTanh"}
"""FlashInfer's names in `ActivationType`."""
MODULES = {(9, 0): "90", (10, 0): "100", (10, 3): "103", (10, 7): "100", (11, 0): "100", (12, 0): "120", (12, 1): "120"}
"""The module that serves a compute capability, as in `get_cutlass_fused_moe_module`."""
BUILD = 'python -c "from flashinfer.fused_moe.core import get_cutlass_fused_moe_module as build; build({!r})"'
TOOLKIT = "/usr/local/cuda"
"""Where FlashInfer looks for nvcc when nothing names it."""

ROUNDS = (1, 4, 8)
"""How often the search times a tactic, in each of its passes (see `coordinate`)."""
FINAL_S = 0.06
"""About how long a final takes where runs are short.

FlashInfer's own autotune takes 16 to 36 s for the 21 buckets up to 8192 rows, 0.8 to 1.7 s each; so may this, all in.
On an H200 it took 21.8 s for packed rows of Qwen3-235B on 4 ranks, FlashInfer 26.6 s (commit b96b5be).
"""

_TOLERANCES = {Precision.BF16: 1e-2, Precision.FP8_TENSOR: 5e-2}


class FlashInferCutlassBackend:
    """FlashInfer's CUTLASS fused MoE with explicit tactics: bf16, and fp8 with one scale a tensor; SM90 and later."""

    name = "flashinfer-cutlass"
    final_s = FINAL_S

    def __init__(self) -> None:
        self.warm: set[Tactic] = set()
        self._able = False
        self._promising: tuple[Tactic, ...] = ()
        self._candidates: dict[tuple[Precision, str], Candidates] = {}
        self._loaded: tuple[tuple[object, ...], Experts] | None = None

    def unavailable(self) -> tuple[str, str] | None:
        """No FlashInfer, one without `profile_ids`, no GPU from SM90, or a module that is not built yet."""
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed", f"pip install {PACKAGE}"
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA device, and torch sees none", "Run on a GPU host with a CUDA build of torch."
        capability = torch.cuda.get_device_capability()
        if capability not in MODULES:
            known = ", ".join(f"{major}.{minor}" for major, minor in MODULES)
            return (
                f"needs compute capability {known}; the device has {capability[0]}.{capability[1]}",
                "Use --backend triton.",
            )
        from flashinfer.fused_moe import cutlass_fused_moe

        if "profile_ids" not in inspect.signature(cutlass_fused_moe).parameters:
            return (
                f"FlashInfer {_version()} has no profile_ids, the argument that names a tactic",
                f"pip install --upgrade {PACKAGE}",
            )
        return unbuilt(MODULES[capability])

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Other precisions, unequal shards, biases and so on. DeepSeek's fp8 blocks run there, untunable."""
        if layer.precision is Precision.FP8_BLOCK:
            return "FlashInfer runs fp8_block experts by one fixed kernel and ignores profile_ids: nothing to tune"
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
        intermediate, multiple = layer.intermediate_size // regime.tp_size, ALIGNMENTS[layer.precision]
        if layer.hidden_size % multiple or intermediate % multiple:
            return f"H = {layer.hidden_size} and I/tp = {intermediate} must be multiples of {multiple}"
        return None

    def environment(self) -> dict[str, str]:
        """FlashInfer's version: tactics are positions in a list that it compiles in."""
        return {"flashinfer": _version()}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Every pair of the two GEMMs' tactics that the device can run, `UNTUNED` first.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        self._require(layer, regime)
        key = layer.precision, device
        if key not in self._candidates:
            from moetune.backends.flashinfer_cutlass_runner import stages

            first, second = stages(layer, regime, device)
            pairs = (Tactic(gemm1=a, gemm2=b) for a in first.runnable for b in second.runnable)
            excluded = {Tactic(gemm1=a): _TOO_BIG for a in first.too_big}
            excluded |= {Tactic(gemm2=b): _TOO_BIG for b in second.too_big}
            self._candidates[key] = Candidates((UNTUNED, *pairs), excluded)
        return self._candidates[key]

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """`UNTUNED`: what the op runs where FlashInfer's autotuner has no entry."""
        return UNTUNED

    def search(self, problem: Problem, candidates: Candidates, starts: Sequence[Tactic]) -> Search:
        """Coordinate descent: GEMM1's tactics beside one good GEMM2, then GEMM2's beside the best GEMM1, then a final.

        With `starts` the sweeps are over what was promising in the buckets searched before, and a few others.
        """
        known = (*starts, *self._promising) if starts else ()
        turn = bisect_left(problem.regime.buckets, problem.rows)
        return self._remembering(coordinate(candidates.tactics, starts=known, rounds=ROUNDS, turn=turn))

    def _remembering(self, search: Search) -> Search:
        measured: dict[Tactic, float] = {}
        batch = next(search)
        while True:
            times = yield batch
            measured |= times
            try:
                batch = search.send(times)
            except StopIteration as stop:
                self._promising = promising(measured)
                return stop.value  # type: ignore[no-any-return]

    def tolerance(self, layer: MoELayer) -> float:
        """1e-2 in bf16; 5e-2 in fp8, where the intermediate is rounded to e4m3."""
        return _TOLERANCES[layer.precision]

    def prepare(self, problem: Problem) -> CutlassRunner:
        """Inputs, routings and workspace; the weights are kept for the next bucket's problem.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the op.
        """
        self._require(problem.layer, problem.regime)
        from moetune.backends.flashinfer_cutlass_runner import CutlassRunner, random_experts

        regime = problem.regime
        key = (problem.layer.digest, problem.shard, problem.intermediate_size, regime.seed, problem.device)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # frees the old weights before the new ones are made
            self._loaded = key, random_experts(problem)
        return CutlassRunner(problem, self._loaded[1])

    def _require(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name}: {reason}.", "Use another backend.")
        if not self._able and (obstacle := self.unavailable()):
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        self._able = True


_TOO_BIG = "needs more shared memory than the device has"


def unbuilt(module: str) -> tuple[str, str] | None:
    """Why the op's module for an architecture (`"90"` …) cannot be loaded at once and what to do, or None.

    FlashInfer takes it from its own wheel, from `flashinfer-jit-cache`, or from a cache that it fills at the first
    call: 248 files for Hopper, about 25 minutes on 64 cores. That is no part of tuning, hence an obstacle.
    """
    from flashinfer.jit import env

    name = f"fused_moe_{module}"
    places = [env.FLASHINFER_AOT_DIR / name, *env.FLASHINFER_JIT_DIR.glob(f"{name}*")]
    if hasattr(env, "get_aot_path"):
        places.append(env.get_aot_path(name).parent)
    if any((place / f"{place.name}.so").is_file() for place in places):
        return None
    install = f"pip install flashinfer-jit-cache=={_version()} (from FlashInfer's own index)"
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        return f"{name} is not prebuilt, and FLASHINFER_DISABLE_JIT forbids to build it", f"{install}, or unset it."
    if not _nvcc():
        return f"{name} is not prebuilt, and there is no nvcc to build it", f"{install}, or a CUDA toolkit with nvcc."
    return (
        f"{name} is not built yet, which takes FlashInfer about half an hour",
        f"{install}, or {BUILD.format(module)}",
    )


def _nvcc() -> bool:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT)
    named: list[Any] = [os.environ.get("FLASHINFER_NVCC"), *(Path(home, "bin/nvcc") for home in homes if home)]
    return shutil.which("nvcc") is not None or any(path and Path(path).is_file() for path in named)


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
