"""Lists the 80 configurations of vLLM's batched Triton GEMM, and finds those that a device can run.

The launcher passes the three block sizes alone, so Triton takes its own number of warps and stages
(`invoke_moe_batched_triton_kernel` in `fused_moe/experts/fused_batched_moe.py` of vLLM 0.26.0 and 0.33.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final, Self

from moetune.backends.base import Candidates
from moetune.backends.grouped_triton import space as grouped
from moetune.backends.grouped_triton.defaults import default_config
from moetune.backends.grouped_triton.shipped import TRITONS_OWN
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

VALUES: Final[Mapping[str, tuple[int, ...]]] = {
    "BLOCK_SIZE_M": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (32, 64, 128, 256),
}
"""The block sizes of vLLM's `benchmark_moe.py`, and 32 for K: operands lie in registers, as there is no pipeline."""
FIXED: Final[Mapping[str, int]] = {"GROUP_SIZE_M": 1, **TRITONS_OWN}
"""How the batched kernel runs the tunables of the grouped one that it does not have: tiles are not grouped."""
MOST_TILES: Final = 65_535
"""The largest second dimension of a grid (CUDA C++ Programming Guide, technical specifications). It is the number of an
expert's tiles, in vLLM's kernel too."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Holds the numbers that the kernels' arguments depend on.

    `capacity` is the number of rows of an expert's block, `hidden_size` H, `intermediate_size` I/tp, and `num_local` L.
    `fp8`: weights are e4m3 with 128×128 block scales, else bf16.
    """

    capacity: int
    hidden_size: int
    intermediate_size: int
    num_local: int
    fp8: bool

    @classmethod
    def of(cls, layer: MoELayer, regime: Regime) -> Self:
        """Returns the shapes of a deployment with the layout batched, for the regime's rank."""
        return cls(
            regime.capacity,
            layer.hidden_size,
            regime.intermediate_size(layer),
            regime.shard(layer).num_local,
            layer.precision is Precision.FP8_BLOCK,
        )


def tactic_of(values: Tactic) -> Tactic:
    """Returns the tactic with the three block sizes of one of the grouped GEMM; what else that has changes nothing."""
    return Tactic({name: values[name] for name in VALUES})


def heuristic(shapes: Shapes) -> Tactic:
    """Returns what vLLM runs without a tuned file: `get_default_config` of the grouped GEMM, at the capacity."""
    return tactic_of(default_config(shapes.capacity, shapes.num_local, shapes.fp8))


def illegal(tactic: Mapping[str, object], shapes: Shapes, limits: grouped.Limits | None) -> str | None:
    """Returns why a device cannot run this configuration, or why it would be wrong or idle; None if it can."""
    fp8, (block_m, block_n, depth) = shapes.fp8, (tactic[name] for name in VALUES)
    assert isinstance(block_m, int)
    assert isinstance(block_n, int)
    assert isinstance(depth, int)
    columns = max(2 * shapes.intermediate_size, shapes.hidden_size)
    if (tiles := -(-shapes.capacity // block_m) * -(-columns // block_n)) > MOST_TILES:
        return f"has {tiles} tiles an expert, a launch may have {MOST_TILES}"
    if fp8 and depth > grouped.SCALE_BLOCK:
        return f"BLOCK_SIZE_K exceeds the scale block of {grouped.SCALE_BLOCK}: one scale would serve two blocks"
    whole = {**FIXED, **tactic}
    if idle := grouped.idle_warps(whole):
        return idle
    if limits is None:
        return None
    if (needed := shared_bytes(tactic, fp8)) > limits.shared_bytes:
        return f"needs {needed} bytes of shared memory, a block may have {limits.shared_bytes}"
    if (registers := grouped.accumulator_registers(whole, fp8)) > limits.registers_per_thread:
        return (
            f"needs {registers} registers a thread for its accumulators alone, a thread may have "
            f"{limits.registers_per_thread}"
        )
    return None


def shared_bytes(tactic: Mapping[str, object], fp8: bool) -> int:
    """Returns the most bytes of shared memory of both operands' tiles. There is no pipeline, see `kernel`."""
    block_m, block_n, depth = (tactic[name] for name in VALUES)
    assert isinstance(block_m, int)
    assert isinstance(block_n, int)
    assert isinstance(depth, int)
    return (block_m + block_n) * depth * (1 if fp8 else 2)


def of_file(values: Mapping[str, object], fp8: bool, limits: grouped.Limits | None) -> Tactic:
    """Returns the tactic that runs a row of a tuned file. BLOCK_SIZE_K is clamped to the scale block as vLLM does it.

    Raises:
        ValueError: the kernel cannot run the row; the message says why.
    """
    sizes: dict[str, int] = {}
    for name in VALUES:
        value = values.get(name)
        if type(value) is not int or value < 1 or value.bit_count() != 1:
            raise ValueError(f"{name} is {value!r}")
        sizes[name] = value
    sizes["BLOCK_SIZE_K"] = grouped.effective_block_size_k(sizes, fp8)
    tactic = Tactic(sizes)
    if limits is not None:
        needed = shared_bytes(tactic, fp8)
        if needed > limits.shared_bytes:
            raise ValueError(f"it needs {needed} bytes of shared memory, a block may have {limits.shared_bytes}")
    return tactic


def candidates(shapes: Shapes, limits: grouped.Limits | None, default: Tactic) -> Candidates:
    """Divides the 80 configurations and the default into candidates and excluded tactics with their reasons.

    Args:
        shapes: the deployment's shapes.
        limits: the device's limits. None excludes only what no device can use.
        default: the tactic that runs where nothing is tuned. It is the first candidate even if it breaks a limit.
    """
    tactics, excluded = [default], {}
    for values in product(*VALUES.values()):
        tactic = Tactic(dict(zip(VALUES, values, strict=True)))
        if tactic == default:
            continue
        if reason := illegal(tactic, shapes, limits):
            excluded[tactic] = reason
        else:
            tactics.append(tactic)
    return Candidates(tuple(tactics), excluded)
