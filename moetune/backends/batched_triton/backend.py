"""Defines `BatchedTritonBackend`, the GEMM that vLLM runs on the expert-major rows of low-latency dispatchers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Candidates, Default, Problem
from moetune.backends.batched_triton import space
from moetune.backends.grouped_triton import shipped, support
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.space import Limits
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError, UsageError
from moetune.quoting import quoted
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.batched_triton.runner import BatchedRunner
    from moetune.backends.grouped_triton.weights import TritonExperts


class BatchedTritonBackend(Backend):
    """Tunes a batched Triton GEMM with the tunables of vLLM's `BatchedTritonExperts`. Both GEMMs run the same tactic.

    Args:
        kernel: the GEMM that is timed: `builtin`, or that of an installed `vllm`.
        engine_configs: a folder with vLLM's tuned files, whose rows are the defaults. By default that of the installed
            vLLM. Its files are those of the grouped GEMM: vLLM looks both kernels up in one file.

    Raises:
        UsageError: `kernel` is none of these, or `engine_configs` is no folder.
    """

    name = "batched-triton"
    modules = ("moetune.backends.batched_triton.runner", "moetune.backends.batched_triton.ahead")
    expert_major = True

    def __init__(self, kernel: str = "builtin", engine_configs: Path | str | None = None) -> None:
        if kernel not in ("builtin", "vllm"):
            raise UsageError(f"The backend {self.name} has no kernel {quoted(kernel)}.", "Choose one of builtin, vllm.")
        if engine_configs is not None:
            shipped.EngineConfigs.of("vllm", engine_configs)
        self.kernel = kernel
        self._engine_configs = engine_configs
        self._weights: WeightCache[TritonExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if Triton, a CUDA device of compute capability 8.0 or the kernel is missing."""

        def kernel() -> object:
            from moetune.backends.batched_triton.gemm import batched_kernel

            return batched_kernel(self.kernel)

        return support.unavailable(kernel, "Use another device.")

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why the layer cannot be computed: its rows, precision, activation, biases, sizes or input weights."""
        return self.other_rows(regime) or support.unsupported(layer, regime)

    def environment(self) -> dict[str, str]:
        """Returns Triton's version, the kernel's name and its source digest."""
        from moetune.backends.batched_triton.gemm import batched_kernel

        return {
            "triton": importlib.metadata.version("triton"),
            "kernel": self.kernel,
            "kernel_source": batched_kernel(self.kernel).digest,
        }

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns the default and those of 80 configurations that the device can run."""
        shapes = space.Shapes.of(layer, regime)
        return space.candidates(shapes, Limits.of(device), self.default(layer, regime, rows))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns what vLLM runs if moetune tunes nothing; see `explained_default`."""
        return self.explained_default(layer, regime, rows).tactic

    def explained_default(self, layer: MoELayer, regime: Regime, rows: int) -> Default:
        """Returns the block sizes that vLLM looks up by the capacity: of the file that it ships, else its heuristic.

        It is the same for every row count. Without a GPU it is the heuristic, and so it is for a row that the kernel
        cannot run.

        Raises:
            UsageError: a file cannot be read.
        """
        shapes = space.Shapes.of(layer, regime)
        heuristic = space.heuristic(shapes)
        device = shipped.device_name()
        if device is None:
            return Default(heuristic, "heuristic")
        configs = shipped.EngineConfigs.of("vllm", self._engine_configs)
        file = ConfigFile.of(layer, regime, device, shapes.num_local)
        row = configs.row(file, shapes.capacity, importlib.metadata.version("triton"))
        if row is None:
            return Default(heuristic, f"heuristic ({configs.absent(file)})")
        named = configs.named(row.name)
        try:
            tactic = space.of_file(row.values, shapes.fp8, Limits.of("cuda"))
        except ValueError as error:
            return Default(
                heuristic,
                f"heuristic (a row of {named} cannot run)",
                f"moetune's kernel cannot run row {row.key} of {named}: {error}. The default is vLLM's heuristic "
                "instead.",
            )
        return Default(
            tactic,
            f"{named}, measured for the grouped kernel",
            hint=f"It is row {row.key} of {named}. To compare with vLLM's heuristic instead, give an empty folder as "
            "--engine-configs.",
        )

    def tolerance(self, layer: MoELayer) -> float:
        """Returns 1e-2 in bf16 and 8e-2 in fp8, where activations and intermediates are rounded to e4m3."""
        return support.TOLERANCES[layer.precision]

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> Sequence[Hashable]:
        """Returns one key a GEMM. The code depends on the shapes alone, not on the rows."""
        return [(space.Shapes.of(layer, regime), tactic, gemm) for gemm in (0, 1)]

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        """Compiles the first or the second GEMM into Triton's cache; see `ahead.compile_gemm`."""
        from moetune.backends.batched_triton.ahead import compile_gemm

        compile_gemm(space.Shapes.of(layer, regime), tactic, part, capability, self.kernel)

    def likely(self, problem: Problem, candidates: Candidates) -> Sequence[Tactic]:
        """Returns all candidates in their order, because the search times them all."""
        return candidates.tactics

    def prepare(self, problem: Problem) -> BatchedRunner:
        """Puts weights, the expert-major inputs, counts and all workspace on the device.

        Raises:
            UnsupportedError: the backend does not compute this layer, or cannot run on this machine.
        """
        if reason := self.unsupported(problem.layer, problem.regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")
        if obstacle := self.unavailable():
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        from moetune.backends.batched_triton.gemm import batched_kernel
        from moetune.backends.batched_triton.runner import BatchedRunner
        from moetune.backends.grouped_triton.weights import random_experts

        experts = self._weights.get(problem, lambda: random_experts(problem))
        return BatchedRunner(problem, experts, batched_kernel(self.kernel))
