"""Defines `TorchBackend`, which tunes plain PyTorch algorithms on CPU and GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Candidates, Inputs, Problem
from moetune.backends.prepared import WeightCache
from moetune.errors import UnsupportedError
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch

    from moetune.backends.plain_torch.algorithms import TorchExperts

DTYPES: Mapping[Precision, str] = {Precision.FP32: "float32", Precision.BF16: "bfloat16", Precision.FP16: "float16"}
"""torch's names of the precisions that run here. fp16 is slow on CPUs without AVX512-FP16."""

ACTIVATIONS = (Activation.SILU, Activation.GELU, Activation.SWIGLU_CLAMPED)
"""The activations that `TorchExperts.gated` computes."""

SCRATCH_SHARE = 0.25
"""The share of the free memory that one call's scratch may take. An engine needs the rest for its cache."""

BIAS_SCALE = 0.1


@dataclass(frozen=True, slots=True)
class ScratchSizes:
    """Holds what scratch memory depends on: rows M, ids in a row k, local experts L, H, I/tp, bytes of a value."""

    rows: int
    top_k: int
    num_local: int
    hidden_size: int
    intermediate_size: int
    value_bytes: int

    @classmethod
    def of(cls, layer: MoELayer, regime: Regime, rows: int) -> ScratchSizes:
        """Returns the sizes of rank 0. No rank has more experts."""
        return cls(
            rows,
            regime.row_top_k(layer),
            regime.shard(layer).num_local,
            layer.hidden_size,
            regime.intermediate_size(layer),
            4 if layer.precision is Precision.FP32 else 2,
        )

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights of the rank's experts."""
        return 3 * self.num_local * self.intermediate_size * self.hidden_size * self.value_bytes

    @property
    def most_slots(self) -> int:
        """The number of slots that a GPU's algorithms process, and the most that can be local."""
        return self.rows * self.top_k

    def flight_bytes(self, slots: int) -> int:
        """Returns the bytes of `slots` rows in two GEMMs: in, out and scaled (float32), gate, up and activation."""
        return slots * ((2 * self.hidden_size + 6 * self.intermediate_size) * self.value_bytes + 4 * self.hidden_size)


SCRATCH_BYTES: Mapping[str, Callable[[ScratchSizes], int]] = {
    "eager": lambda s: s.flight_bytes(s.rows) + 16 * s.most_slots * (s.num_local + 1),
    "batched_mm": lambda s: (
        s.flight_bytes(s.most_slots) + 3 * s.most_slots * s.intermediate_size * s.hidden_size * s.value_bytes
    ),
    "grouped_mm": lambda s: s.flight_bytes(s.most_slots),
    "segment_mm": lambda s: s.flight_bytes(s.most_slots),
    "padded_bmm": lambda s: s.flight_bytes(s.num_local * s.rows) + s.flight_bytes(s.most_slots),
    "dense": lambda s: s.flight_bytes(s.num_local * s.rows),
}
"""Upper bounds of the bytes that one call allocates for the worst load: all slots local, all rows at one expert."""


class TorchBackend(Backend):
    """Tunes six algorithms of one MoE layer in plain PyTorch; see `algorithms`.

    Args:
        scratch_limit_bytes: the bytes that one call may allocate; by default a quarter of the free memory.
    """

    name = "torch"
    modules = ("moetune.backends.plain_torch.algorithms",)

    def __init__(self, scratch_limit_bytes: int | None = None) -> None:
        self._scratch_limit_bytes = scratch_limit_bytes
        self._weights: WeightCache[TorchExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if torch is missing."""
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed", "pip install torch"
        return None

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why the layer cannot be computed: rows, quantized weights, or an activation that is unknown here."""
        if reason := self.other_rows(regime):
            return reason
        if layer.activation not in ACTIVATIONS:
            return f"computes {', '.join(ACTIVATIONS)} between the GEMMs, not {layer.activation.value}"
        if layer.precision not in DTYPES:
            return (
                f"plain PyTorch has no expert GEMM for {layer.precision.value} weights; "
                f"use --precision bf16, or another of {', '.join(DTYPES)}"
            )
        return None

    def environment(self) -> dict[str, str]:
        """Returns nothing: the only version that matters is torch's, which every environment has."""
        return {}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns all algorithms except those that this build of torch lacks or whose scratch does not fit.

        Raises:
            UnsupportedError: the backend does not compute this layer.
        """
        sizes = ScratchSizes.of(layer, regime, rows)
        dtype = self._dtype(layer, regime)
        limit = self._scratch_limit(sizes, device)
        tactics: list[Tactic] = []
        excluded: dict[Tactic, str] = {}
        for algorithm, scratch_bytes in SCRATCH_BYTES.items():
            tactic = Tactic(algorithm=algorithm)
            if tactic != self.default(layer, regime, rows) and (needed := scratch_bytes(sizes)) > limit:
                excluded[tactic] = f"needs up to {needed / 2**20:,.0f} MiB of scratch, {limit / 2**20:,.0f} MiB allowed"
            elif algorithm == "grouped_mm" and (missing := _grouped_mm_missing(sizes, dtype, device)):
                excluded[tactic] = missing
            else:
                tactics.append(tactic)
        return Candidates(tuple(tactics), excluded)

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns `eager`, which Hugging Face transformers runs by default."""
        return Tactic(algorithm="eager")

    def tolerance(self, layer: MoELayer) -> float:
        """Returns 1e-5 in fp32 and 1e-2 in 16 bits, where values are rounded between the GEMMs."""
        return 1e-5 if layer.precision is Precision.FP32 else 1e-2

    def prepare(self, problem: Problem) -> TorchRunner:
        """Draws inputs and weights. Weights depend on layer, shard and seed, and are kept for the next bucket.

        Raises:
            UnsupportedError: the backend does not compute this layer.
        """
        import torch

        regime = problem.regime
        dtype = self._dtype(problem.layer, regime)
        experts = self._weights.get(problem, lambda: _random_experts(problem, dtype))
        generator = torch.Generator(problem.device).manual_seed(regime.seed + 1)
        shape = (problem.rows + len(problem.draws) - 1, problem.layer.hidden_size)
        inputs = torch.randn(shape, generator=generator, device=problem.device).to(dtype)
        return TorchRunner(experts, inputs, problem)

    def _dtype(self, layer: MoELayer, regime: Regime) -> torch.dtype:
        import torch

        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend torch: {reason}.", "Use another backend.")
        dtype: torch.dtype = getattr(torch, DTYPES[layer.precision])
        return dtype

    def _scratch_limit(self, sizes: ScratchSizes, device: str) -> int:
        if self._scratch_limit_bytes is not None:
            return self._scratch_limit_bytes
        still_to_load = 0 if self._weights.filled else sizes.weight_bytes
        return int(SCRATCH_SHARE * max(available_bytes(device) - still_to_load, 0))


class TorchRunner:
    """Runs one problem on its weights, inputs and routings.

    Draw d has the inputs `d … d + M − 1` of one buffer, so no row has the same input in two draws.
    """

    def __init__(self, experts: TorchExperts, inputs: torch.Tensor, problem: Problem) -> None:
        self._experts = experts
        self._draws = [
            Inputs(
                inputs[number : number + problem.rows],
                draw.routing.topk_ids.to(problem.device),
                draw.routing.topk_weights.to(problem.device),
            )
            for number, draw in enumerate(problem.draws)
        ]

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """Computes `[M, H]` in the layer's precision by the tactic's algorithm."""
        from moetune.backends.plain_torch.algorithms import ALGORITHMS

        return ALGORITHMS[str(tactic["algorithm"])](self._experts, *self._draws[draw])

    def inputs(self, draw: int = 0) -> Inputs:
        """See `FillableRunner.inputs`. Draws share inputs, so only those of one draw should be overwritten."""
        return self._draws[draw]

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Computes `[M, H]` in float32 from the same weights and inputs."""
        from moetune.backends.plain_torch.algorithms import reference

        return reference(self._experts, *self._draws[draw])


def available_bytes(device: str) -> int:
    """Returns the free memory of `device`; on the CPU, within the limits of the machine and the container."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):  # no cgroup v2, or no limit
        return available


def _random_experts(problem: Problem, dtype: torch.dtype) -> TorchExperts:
    """Draws normal weights of variance 1/fan-in, so that values keep their size, and biases if the layer has them.

    Under tensor parallelism every rank's `b2` is whole, as on the one rank that adds it.
    """
    import torch

    from moetune.backends.plain_torch.algorithms import TorchExperts

    layer, count = problem.layer, problem.shard.num_local
    hidden, inner = layer.hidden_size, problem.intermediate_size
    generator = torch.Generator(problem.device).manual_seed(problem.regime.seed)

    def normal(scale: float, *shape: int) -> torch.Tensor:
        values = torch.empty(count, *shape, dtype=dtype, device=problem.device)
        for expert in values:  # in float32 one expert at a time: all at once would double the memory
            expert.copy_(torch.randn(shape, generator=generator, device=problem.device).mul_(scale))
        return values

    return TorchExperts(
        first=problem.shard.first,
        w1=normal(hidden**-0.5, 2 * inner, hidden),
        w2=normal(inner**-0.5, hidden, inner),
        b1=normal(BIAS_SCALE, 2 * inner) if layer.expert_bias else None,
        b2=normal(BIAS_SCALE, hidden) if layer.expert_bias else None,
        activation=layer.activation,
        weight_on_input=layer.weight_on_input,
    )


def _grouped_mm_missing(sizes: ScratchSizes, dtype: torch.dtype, device: str) -> str | None:
    from moetune.backends.plain_torch.algorithms import grouped_mm_missing

    return grouped_mm_missing(sizes.hidden_size, sizes.intermediate_size, dtype, device)
