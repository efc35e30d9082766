"""Defines `TritonBackend`, the grouped GEMM that most vLLM and SGLang deployments on Hopper run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Candidates, Default, Problem
from moetune.backends.grouped_triton import shipped, space, support
from moetune.backends.grouped_triton.defaults import engine_default
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.kernel_versions import (
    NEWEST,
    KernelVersion,
    Remote,
    kernel_version,
    stored_name,
    unread,
)
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError, UsageError
from moetune.quoting import quoted
from moetune.search.base import Search
from moetune.search.prior_guided import halving
from moetune.search.revalidate import steps
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.grouped_triton.runner import TritonRunner
    from moetune.backends.grouped_triton.weights import TritonExperts


class TritonBackend(Backend):
    """Tunes a Triton grouped GEMM with the tunables of vLLM and SGLang. Both GEMMs of a layer run the same tactic.

    Args:
        kernel: the grouped GEMM that is timed: `builtin`, or that of an installed `vllm` or `sglang`.
        remote: how non-local slots are treated: `drop` skips them (vLLM from 0.31), `zero` runs blocks that write
            zeros for them (earlier vLLM, SGLang). By default what the kernel's version does.
        engine_configs: a folder with the tuned files of the kernel's engine (vLLM for the builtin kernel), whose rows
            are the defaults. By default that of the installed engine.
        kernel_version: the version of vLLM that the builtin kernel computes like; see `kernel_versions`. [default: the
            newest]

    Raises:
        UsageError: `kernel` or `remote` is none of these, `engine_configs` is no folder, `kernel_version` was not read,
            or is given for another kernel.
    """

    name = "triton"
    modules = ("moetune.backends.grouped_triton.runner", "moetune.backends.grouped_triton.ahead")

    def __init__(
        self,
        kernel: str = "builtin",
        remote: Remote | None = None,
        engine_configs: Path | str | None = None,
        kernel_version: str | None = None,
    ) -> None:
        if kernel not in ("builtin", "vllm", "sglang"):
            raise UsageError(f"Unknown kernel {quoted(kernel)}.", "Choose one of builtin, vllm, sglang.")
        if remote not in (None, "drop", "zero"):
            raise UsageError(f"Unknown treatment of non-local slots {quoted(remote)}.", "Choose drop or zero.")
        self.kernel = kernel
        self._engine = "sglang" if kernel == "sglang" else "vllm"
        self._engine_configs = engine_configs
        if engine_configs is not None:
            shipped.EngineConfigs.of(self._engine, engine_configs)
        self.version = _version(kernel, kernel_version)
        self._given_remote, self._given_version = remote, kernel_version
        self._weights: WeightCache[TritonExperts] = WeightCache()
        self.remote: Remote = remote or ("zero" if kernel == "sglang" else self.version.remote)

    def for_version(self, version: str, layer: MoELayer, regime: Regime) -> TritonBackend:
        """Returns the backend that computes a layer as a version of vLLM does. Options that were given stay.

        A version that was not read is taken as the nearest one that was. If the layer's precision runs alike in this
        version and in the newest, the backend is the newest's.

        Raises:
            UsageError: `version` is no version, or the kernel that was chosen computes the layer in another way.
        """
        wanted = kernel_version("vllm", version)
        same = self.version.runs_like(wanted) or layer.precision is not Precision.FP8_BLOCK
        if not same and (self.kernel != "builtin" or self._given_version is not None):
            raise UsageError(
                f"The kernel of vLLM {version} is not the one that was chosen: {self._given_version or self.kernel}.",
                f"Leave --kernel and kernel_version out, or give --backend-option kernel_version={version}.",
            )
        remote = self._given_remote or (wanted.remote if space.has_remote_slots(layer, regime) else None)
        return TritonBackend(
            self.kernel, remote, self._engine_configs, kernel_version=self._given_version if same else wanted.since
        )

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if Triton, a CUDA device of compute capability 8.0 or the kernel is missing."""

        def kernel() -> object:
            from moetune.backends.grouped_triton.sources import grouped_kernel

            return grouped_kernel(self.kernel)

        return support.unavailable(kernel, "Use --backend torch.")

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why the layer cannot be computed: its rows, precision, activation, biases, sizes or input weights."""
        return self.other_rows(regime) or support.unsupported(layer, regime)

    def environment(self) -> dict[str, str]:
        """Returns Triton's version, the kernel's name, its source digest and the treatment of non-local slots.

        `kernel_version` is one of them only for versions of vLLM whose kernel or default is not that of the newest.
        """
        from moetune.backends.grouped_triton.sources import grouped_kernel

        return {
            "triton": importlib.metadata.version("triton"),
            "kernel": self.kernel,
            "kernel_source": grouped_kernel(self.kernel).digest,
            "remote": self.remote,
            **({} if (older := stored_name(self.version)) is None else {"kernel_version": older}),
        }

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns the default and those of 1920 configurations that the device can run and that differ."""
        return space.candidates(
            self._shapes(layer, regime, rows),
            space.Limits.of(device),
            self.default(layer, regime, rows),
            zero_remote=self.remote == "zero",
            clamps_k=self.kernel != "sglang",
        )

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns what the engine runs if moetune tunes nothing; see `explained_default`."""
        return self.explained_default(layer, regime, rows).tactic

    def heuristic(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns what the engine runs without a tuned file."""
        return engine_default(self._shapes(layer, regime, rows))

    def explained_default(self, layer: MoELayer, regime: Regime, rows: int) -> Default:
        """Returns the row of the tuned file that the engine ships for the layer and the GPU, else its heuristic.

        The engine is SGLang for its kernel, else vLLM. Without a GPU the default is the heuristic. It is so too for a
        row that the kernel cannot run.

        Raises:
            UsageError: a file cannot be read.
        """
        shapes = self._shapes(layer, regime, rows)
        heuristic = engine_default(shapes)
        device = shipped.device_name()
        if device is None:
            return Default(heuristic, "heuristic")
        configs = shipped.EngineConfigs.of(self._engine, self._engine_configs)
        file = ConfigFile.of(layer, regime, device, regime.shard(layer).num_local)
        row = configs.row(file, rows, importlib.metadata.version("triton"))
        if row is None:
            return Default(heuristic, f"heuristic ({configs.absent(file)})")
        limits, named = space.Limits.of("cuda"), configs.named(row.name)
        tactic = shipped.runnable(row.values, self._engine, shapes, limits)
        if isinstance(tactic, str):
            return Default(
                heuristic,
                f"heuristic (a row of {named} cannot run)",
                f"moetune's kernel cannot run row {row.key} of {named}: {tactic}. The default is {configs.title}'s "
                "heuristic instead.",
            )
        hint = (
            f"It is row {row.key} of {named}. To compare with {configs.title}'s heuristic instead, give an empty "
            "folder as --engine-configs."
        )
        if row.down is not None and shipped.runnable(row.down, self._engine, shapes, limits) != tactic:
            return Default(
                tactic,
                f"{named}, for both GEMMs",
                f"{configs.title} runs the second GEMM by {row.down_name}. moetune runs both GEMMs with one "
                f"configuration, so the default is that of the first GEMM, of {named}.",
                hint,
            )
        return Default(tactic, named, hint=hint)

    def search(self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]) -> Search:
        """Returns a search that measures a twentieth of the candidates; see `halving`."""
        return halving(candidates.tactics, predicted_us=self._predicted_us(problem, candidates), starts=warm_starts)

    def neighbors(self, candidates: Candidates, tactic: Tactic, others: Sequence[Tactic]) -> Sequence[Tactic]:
        """Returns the candidates one step from `tactic` along each tunable; see `steps`."""
        return steps(candidates.tactics, tactic)

    def likely(self, problem: Problem, candidates: Candidates) -> Sequence[Tactic]:
        """Returns the default, then the others by the prior; one of each set with equal priors precedes the rest."""
        default, *others = candidates.tactics
        predicted_us = self._predicted_us(problem, candidates) or {}
        alike: Counter[float] = Counter()

        def order(tactic: Tactic) -> tuple[bool, float]:
            expected = predicted_us.get(tactic, 0.0)
            alike[expected] += 1
            return alike[expected] > 1, expected

        return default, *sorted(others, key=order)

    def _predicted_us(self, problem: Problem, candidates: Candidates) -> Mapping[Tactic, float] | None:
        limits = space.Limits.of(problem.device)
        if limits is None:  # the prior describes a GPU, so it is useless under the interpreter
            return None
        return space.predicted_us(
            candidates.tactics,
            self._shapes(problem.layer, problem.regime, problem.rows),
            [draw.routing.load.tolist() for draw in problem.draws if draw.kind == "search"],
            space.machine(problem.device),
            limits.capability,
        )

    def tolerance(self, layer: MoELayer) -> float:
        """Returns 1e-2 in bf16 and 8e-2 in fp8, where activations and intermediates are rounded to e4m3."""
        return support.TOLERANCES[layer.precision]

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> Sequence[Hashable]:
        """Returns one key a GEMM. The builtin kernel has equal keys for all rows of a layer; an engine's may not."""
        shapes = self._shapes(layer, regime, rows)
        code: Hashable = shapes
        if self.kernel == "builtin":
            swaps = self.version.swaps_operands
            code = shapes.top_k, shapes.hidden_size, shapes.intermediate_size, shapes.fp8, shapes.sorted, swaps
        return [(code, tactic, gemm) for gemm in (0, 1)]

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        """Compiles the first or the second GEMM into Triton's cache; see `ahead.compile_gemms`."""
        from moetune.backends.grouped_triton.ahead import compile_gemms

        shapes, zero_remote = self._shapes(layer, regime, rows), self.remote == "zero"
        compile_gemms(shapes, tactic, (part,), capability=capability, kernel=self.kernel, zero_remote=zero_remote)

    def prepare(self, problem: Problem) -> TritonRunner:
        """Puts weights, inputs, routings and all workspace on the device.

        Raises:
            UnsupportedError: the backend does not compute this layer, or cannot run on this machine.
        """
        if reason := self.unsupported(problem.layer, problem.regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")
        if obstacle := self.unavailable():
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        from moetune.backends.grouped_triton.runner import TritonRunner
        from moetune.backends.grouped_triton.weights import random_experts

        experts = self._weights.get(problem, lambda: random_experts(problem))
        return TritonRunner(problem, experts, self.kernel, zero_remote=self.remote == "zero", version=self.version)

    def _shapes(self, layer: MoELayer, regime: Regime, rows: int) -> space.Shapes:
        return space.Shapes.of(layer, regime, rows, kernel=self.kernel, version=self.version)


def _version(kernel: str, given: str | None) -> KernelVersion:
    """Returns what vLLM's kernel does in the given version, or in the installed one for the kernel `vllm`."""
    if given is None:
        installed = _installed_vllm() if kernel == "vllm" else None
        return NEWEST if installed is None else kernel_version("vllm", installed)
    if kernel != "builtin":
        raise UsageError(
            f"kernel_version is for --kernel builtin; {kernel}'s kernel has the version that is installed.",
            "Leave kernel_version or --kernel out.",
        )
    if (known := unread("vllm", given)) is not None:
        raise UsageError(f"moetune does not know the kernel of vLLM {given}.", f"It knows {known}.")
    return kernel_version("vllm", given)


def _installed_vllm() -> str | None:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
