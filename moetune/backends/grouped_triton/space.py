"""Lists the 1920 configurations of vLLM's and SGLang's grouped GEMM, and finds those that a device can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

from moetune.backends.base import Candidates
from moetune.backends.grouped_triton.cost_model import Gemm, Machine, Tile
from moetune.backends.grouped_triton.cost_model import predicted_us as gemm_us
from moetune.backends.grouped_triton.kernel_versions import NEWEST, KernelVersion
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

VALUES: Mapping[str, tuple[int, ...]] = {
    "BLOCK_SIZE_M": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (64, 128, 256),
    "GROUP_SIZE_M": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
"""The search space of vLLM's `benchmark_moe.py` and SGLang's `tuning_fused_moe_triton.py`."""

SCALE_BLOCK = 128
"""In fp8, one scale is shared by a 128×128 tile of a weight, and by 128 consecutive values of an activation."""

_LANES = 32
_MMA_ROWS, _MMA_COLUMNS = 16, 8  # the output of one mma.sync m16n8, which is the least that a warp computes
_WGMMA_ROWS = 64
_BF16_FLOPS_PER_CLOCK = {8: 2048, 9: 4096, 10: 8192}  # one SM, dense, by major compute capability
_L2_BYTES_PER_CLOCK = 32  # what one SM sustains
_REGISTERS_PER_THREAD = 255  # since compute capability 3.5 (CUDA C++ Programming Guide, technical specifications)


@dataclass(frozen=True, slots=True)
class Shapes:
    """Holds the numbers that the kernels' arguments depend on.

    `rows` is M, `top_k` the number of ids in a row, `hidden_size` H and `intermediate_size` I/tp. The rank has
    `num_local` of `num_experts` physical experts. `fp8`: weights are e4m3 with 128×128 block scales, else bf16.
    `sglang`: slots are aligned as in SGLang 0.5.23 (`moe_align_block_size`): they are always sorted, and only local
    experts bound the grid. `version`: what vLLM's kernel does in the version that is measured.
    """

    rows: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_local: int
    num_experts: int
    fp8: bool
    sglang: bool = False
    version: KernelVersion = NEWEST

    @classmethod
    def of(
        cls,
        layer: MoELayer,
        regime: Regime,
        rows: int,
        rank: int = 0,
        *,
        kernel: str = "builtin",
        version: KernelVersion = NEWEST,
    ) -> Self:
        """Returns the shapes of one bucket for a kernel. The builtin kernel is launched as vLLM launches its own."""
        shard = regime.shard(layer, rank)
        return cls(
            rows,
            regime.row_top_k(layer),
            layer.hidden_size,
            regime.intermediate_size(layer),
            shard.num_local,
            shard.num_physical,
            layer.precision is Precision.FP8_BLOCK,
            sglang=kernel == "sglang",
            version=version,
        )

    @property
    def num_slots(self) -> int:
        """M · k, or M in the slot layout."""
        return self.rows * self.top_k

    @property
    def whole_layer(self) -> bool:
        """Whether this rank holds all experts. Then the engines run without an expert map."""
        return self.num_local == self.num_experts

    @property
    def sorted(self) -> bool:
        """Whether slots are sorted by expert. vLLM does not sort if all experts are local and 4·M·k ≤ E."""
        return self.sglang or not self.whole_layer or 4 * self.num_slots > self.num_experts

    def num_groups(self, zero_remote: bool) -> int:
        """Returns the most groups of slots that are padded to blocks. It bounds the grid. vLLM counts all experts."""
        return max(0 if self.sglang else self.num_experts, self.num_local + zero_remote)


@dataclass(frozen=True, slots=True)
class Limits:
    """Holds what one block of threads may use on a device."""

    capability: tuple[int, int]
    shared_bytes: int
    registers_per_thread: int
    registers_per_block: int

    @classmethod
    def of(cls, device: str) -> Self | None:
        """Returns the limits of a CUDA device, as Triton's driver reports them; None for a CPU."""
        import torch

        where = torch.device(device)
        if where.type != "cuda":
            return None
        import triton

        index = torch.cuda.current_device() if where.index is None else where.index
        properties = triton.runtime.driver.active.utils.get_device_properties(index)
        return cls(
            torch.cuda.get_device_capability(index),
            properties["max_shared_mem"],
            _REGISTERS_PER_THREAD,
            properties["max_num_regs"],
        )


def has_remote_slots(layer: MoELayer, regime: Regime) -> bool:
    """Returns whether rows in a rank's kernel have non-local slots, or empty ones (−1)."""
    shard = regime.shard(layer)
    if shard.num_local == shard.num_physical or regime.layout == "slot":
        return False
    return regime.layout != "packed" or shard.num_local < layer.top_k


def machine(device: str) -> Machine:
    """Returns the rates and resources of a CUDA device, as Triton's driver and torch report them."""
    import torch
    import triton

    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    of_torch = torch.cuda.get_device_properties(index)
    of_driver = triton.runtime.driver.active.utils.get_device_properties(index)
    sms, clock_mhz = of_driver["multiprocessor_count"], of_driver["sm_clock_rate"] / 1e3
    flops_per_clock = _BF16_FLOPS_PER_CLOCK[max(major for major in _BF16_FLOPS_PER_CLOCK if major <= of_torch.major)]
    return Machine(
        num_sms=sms,
        shared_bytes=of_torch.shared_memory_per_multiprocessor,
        registers=of_driver["max_num_regs"],
        max_threads=of_torch.max_threads_per_multi_processor,
        dram_bytes_per_us=2 * of_driver["mem_clock_rate"] / 1e3 * of_driver["mem_bus_width"] / 8,
        l2_bytes_per_us=sms * clock_mhz * _L2_BYTES_PER_CLOCK,
        bf16_flops_per_us=sms * clock_mhz * flops_per_clock,
    )


def max_padded_slots(num_slots: int, num_groups: int, block_size: int) -> int:
    """Returns vLLM's bound of its grid: the most slots if each of `num_groups` groups is padded to whole blocks."""
    return min(num_slots * block_size, num_slots + num_groups * (block_size - 1))


def swaps_operands(
    tactic: Mapping[str, object], fp8: bool, capability: tuple[int, ...], version: KernelVersion = NEWEST
) -> bool:
    """Returns whether the kernel computes the transposed tile: in fp8 on Hopper if BM < 64 ≤ BN.

    Sources: sglang#15712, sglang#16723; vllm#36559 (0.25).
    """
    block_m, block_n = _number(tactic, "BLOCK_SIZE_M"), _number(tactic, "BLOCK_SIZE_N")
    return version.swaps_operands and fp8 and capability[0] == 9 and block_m < _WGMMA_ROWS <= block_n


def effective_block_size_k(tactic: Mapping[str, object], fp8: bool) -> int:
    """Returns BLOCK_SIZE_K, in fp8 limited to the scale block as in vLLM."""
    block_k = _number(tactic, "BLOCK_SIZE_K")
    return min(block_k, SCALE_BLOCK) if fp8 else block_k


def shared_bytes(
    tactic: Mapping[str, object], fp8: bool, capability: tuple[int, int], version: KernelVersion = NEWEST
) -> int:
    """Returns the bytes of shared memory of the software pipeline. A stage holds one tile of each operand.

    mma.sync reads its operands from registers, so Triton keeps one stage less for it. wgmma (Hopper, 64 rows or more)
    reads them from shared memory. The up to 4 · BLOCK_SIZE_N bytes that Triton adds for fp8 scales are not counted.
    """
    block_m, block_n = _number(tactic, "BLOCK_SIZE_M"), _number(tactic, "BLOCK_SIZE_N")
    tiles = (block_m + block_n) * effective_block_size_k(tactic, fp8) * (1 if fp8 else 2)
    return tiles * (_number(tactic, "num_stages") - (not _operands_from_shared(tactic, fp8, capability, version)))


def accumulator_registers(tactic: Mapping[str, object], fp8: bool) -> int:
    """Returns a thread's fp32 registers for accumulators. Block scales need a second one, for the unscaled product."""
    tile = _number(tactic, "BLOCK_SIZE_M") * _number(tactic, "BLOCK_SIZE_N")
    return tile // (_number(tactic, "num_warps") * _LANES) * (2 if fp8 else 1)


def illegal(tactic: Mapping[str, object], fp8: bool, limits: Limits, version: KernelVersion = NEWEST) -> str | None:
    """Returns why a device cannot run this configuration without spilling or failing; None if it can."""
    needed = shared_bytes(tactic, fp8, limits.capability, version)
    if needed > limits.shared_bytes:
        return f"needs {needed} bytes of shared memory, a block may have {limits.shared_bytes}"
    threads = _number(tactic, "num_warps") * _LANES
    available = min(limits.registers_per_thread, limits.registers_per_block // threads)
    if (registers := accumulator_registers(tactic, fp8)) > available:
        return f"needs {registers} registers a thread for its accumulators alone, a thread may have {available}"
    return None


def idle_warps(tactic: Mapping[str, object]) -> str | None:
    """Returns why some warps would repeat the work of others, or None. Each warp needs a 16×8 MMA tile of its own."""
    tiles = _number(tactic, "BLOCK_SIZE_M") * _number(tactic, "BLOCK_SIZE_N") // (_MMA_ROWS * _MMA_COLUMNS)
    if tiles < _number(tactic, "num_warps"):
        return f"has {tiles} MMA tiles of 16×8 for {tactic['num_warps']} warps"
    return None


def candidates(
    shapes: Shapes, limits: Limits | None, default: Tactic, *, zero_remote: bool, clamps_k: bool = True
) -> Candidates:
    """Divides the 1920 configurations and the default into candidates and excluded tactics with their reasons.

    Args:
        shapes: the bucket's shapes.
        limits: the device's limits. None excludes only what no device can use.
        default: the tactic that runs where nothing is tuned. It is the first candidate even if it breaks a limit.
        zero_remote: whether blocks of non-local slots write zeros.
        clamps_k: whether the kernel limits BLOCK_SIZE_K to the scale block, as vLLM's does. SGLang's does not, and
            would compute wrong numbers with a larger one.
    """
    kept: dict[tuple[int, ...], Tactic] = {_behavior(default, shapes, zero_remote): default}
    excluded: dict[Tactic, str] = {}
    for values in product(*VALUES.values()):
        tactic = tactic_of(*values)
        if tactic == default:
            continue
        if shapes.fp8 and not clamps_k and tactic["BLOCK_SIZE_K"] > SCALE_BLOCK:  # type: ignore[operator]
            excluded[tactic] = (
                f"BLOCK_SIZE_K exceeds the scale block of {SCALE_BLOCK}: one scale would serve two blocks"
            )
        elif reason := idle_warps(tactic) or (illegal(tactic, shapes.fp8, limits, shapes.version) if limits else None):
            excluded[tactic] = reason
        elif same := kept.get(behavior := _behavior(tactic, shapes, zero_remote)):
            excluded[tactic] = f"runs the same as {same}"
        else:
            kept[behavior] = tactic
    return Candidates(tuple(kept.values()), excluded)


def predicted_us(
    tactics: Sequence[Tactic],
    shapes: Shapes,
    loads: Sequence[Sequence[int]],
    machine: Machine,
    capability: tuple[int, int],
) -> dict[Tactic, float]:
    """Returns the predicted time of both GEMMs in µs by tactic. It is the prior of a search.

    Args:
        tactics: tactics of `candidates`.
        shapes: the bucket's shapes.
        loads: the number of slots of each local expert, one sequence a draw.
        machine: the GPU's rates and resources.
        capability: the device's compute capability, such as (9, 0).
    """
    value_bytes = 1 if shapes.fp8 else 2
    gemms = (
        Gemm(2 * shapes.intermediate_size, shapes.hidden_size, value_bytes),
        Gemm(shapes.hidden_size, shapes.intermediate_size, value_bytes),
    )
    tiles: dict[Tile, float] = {}
    predicted: dict[Tactic, float] = {}
    for tactic in tactics:
        tile = _tile(tactic, shapes.fp8, capability, shapes.version)
        if tile not in tiles:
            tiles[tile] = sum(gemm_us(machine, gemm, tile, loads) for gemm in gemms)
        predicted[tactic] = tiles[tile]
    return predicted


def _tile(tactic: Tactic, fp8: bool, capability: tuple[int, int], version: KernelVersion) -> Tile:
    from_shared = _operands_from_shared(tactic, fp8, capability, version)
    return Tile(
        rows=_number(tactic, "BLOCK_SIZE_M"),
        columns=_number(tactic, "BLOCK_SIZE_N"),
        depth=effective_block_size_k(tactic, fp8),
        num_warps=_number(tactic, "num_warps"),
        buffers=_number(tactic, "num_stages") - (not from_shared),
        shared_bytes=shared_bytes(tactic, fp8, capability, version),
        accumulators=accumulator_registers(tactic, fp8),
        wgmma=from_shared,
    )


def _operands_from_shared(
    tactic: Mapping[str, object], fp8: bool, capability: tuple[int, int], version: KernelVersion
) -> bool:
    """Returns whether Triton computes with wgmma: on Hopper if the tile, as it is computed, has 64 rows or more."""
    return capability[0] >= 9 and (
        _number(tactic, "BLOCK_SIZE_M") >= _WGMMA_ROWS or swaps_operands(tactic, fp8, capability, version)
    )


def _behavior(tactic: Tactic, shapes: Shapes, zero_remote: bool) -> tuple[int, ...]:
    """Returns a key that is equal for configurations that compute the same tiles in the same order."""
    block_m = _number(tactic, "BLOCK_SIZE_M")
    if shapes.sorted:
        num_blocks = -(-max_padded_slots(shapes.num_slots, shapes.num_groups(zero_remote), block_m) // block_m)
    else:
        num_blocks = shapes.num_slots
    values = {name: _number(tactic, name) for name in VALUES}
    values["BLOCK_SIZE_K"] = effective_block_size_k(tactic, shapes.fp8)
    values["GROUP_SIZE_M"] = min(values["GROUP_SIZE_M"], num_blocks)
    return tuple(values.values())


def tactic_of(*values: int) -> Tactic:
    """Returns the tactic with these values, in the order of `VALUES`."""
    return Tactic(dict(zip(VALUES, values, strict=True)))


def _number(tactic: Mapping[str, object], name: str) -> int:
    value = tactic[name]
    assert isinstance(value, int)
    return value
