"""Predicts the time of a grouped GEMM from the padding, the waves of tiles and the bytes in flight.

The prediction only ranks tactics roughly. The search corrects it by measuring, so the constants are round numbers. On
the recorded tables the regret changes by less than 0.2 percentage points if any of them is doubled or halved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LATENCY_US = 1.0
"""The time of a read from DRAM under load."""
_STEP_US = 0.25
"""The time of one step of a tile's K loop if it waits for the step before."""
_TILE_US = 1.0
"""The time of a tile's prologue and epilogue."""
_MMA_ROWS = 16
_BASE_REGISTERS = 60
"""The number of a thread's registers that hold no accumulators."""
_SPILL_COST = 0.05
"""The share of the time that each register over the limit adds."""
_OVERLAP = 3.0
"""The order of the norm that joins the bounds. 1 adds them (no overlap); infinity takes the largest (full overlap)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Describes a GPU: its rates per µs and the resources of one streaming multiprocessor (SM)."""

    num_sms: int
    shared_bytes: int
    registers: int
    max_threads: int
    dram_bytes_per_us: float
    l2_bytes_per_us: float
    bf16_flops_per_us: float


@dataclass(frozen=True, slots=True)
class Gemm:
    """Describes one grouped GEMM: `[slots, K] @ [K, N]` for every expert. A value of an operand has `value_bytes`."""

    N: int
    K: int
    value_bytes: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Describes what one block of threads computes at a time, and the resources that it uses.

    `accumulators`: a thread's fp32 registers. `buffers`: the stages of the pipeline that may be in flight. `wgmma`:
    whether the tile uses Hopper's wgmma, which reads its operands from shared memory, or mma.sync, which has about a
    third of its rate.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    buffers: int
    shared_bytes: int
    accumulators: int
    wgmma: bool


def predicted_us(machine: Machine, gemm: Gemm, tile: Tile, loads: Sequence[Sequence[int]]) -> float:
    """Returns the predicted time of one grouped GEMM in µs.

    A norm joins four lower bounds: DRAM traffic at the rate that the bytes in flight allow (Little's law), L2 traffic,
    tensor-core work in whole waves of tiles, and the latency of the K loop.

    Args:
        machine: the GPU's rates and resources.
        gemm: the product's shape.
        tile: the tactic's tile.
        loads: the number of slots of each local expert, one sequence a draw. The prediction is for their mean.
    """
    blocks = sum(-(-slots // tile.rows) for load in loads for slots in load) / len(loads)
    active = sum(slots > 0 for load in loads for slots in load) / len(loads)
    slots = sum(map(sum, loads)) / len(loads)
    if not blocks:
        return _TILE_US
    tiles = blocks * -(-gemm.N // tile.columns)
    resident = machine.num_sms * _occupancy(machine, tile)
    waves = tiles / resident
    whole_waves = math.ceil(waves)

    step_bytes = (tile.rows + tile.columns) * tile.depth * gemm.value_bytes
    in_flight = min(tiles, resident) * max(tile.buffers, 1) * step_bytes
    dram_us_per_byte = 1 / machine.dram_bytes_per_us + _LATENCY_US / in_flight
    dram_us = (active * gemm.N + slots) * gemm.K * gemm.value_bytes * dram_us_per_byte
    l2_us = tiles * gemm.K / tile.depth * step_bytes / machine.l2_bytes_per_us

    flops = tiles * 2 * max(tile.rows, _MMA_ROWS) * tile.columns * gemm.K
    rate = machine.bf16_flops_per_us * 2 / gemm.value_bytes * _efficiency(tile) * min(1.0, tiles / machine.num_sms)
    idle_in_last_wave = max(1.0, whole_waves / waves) if waves > 1 else 1.0
    tensor_us = flops / rate * idle_in_last_wave
    latency_us = whole_waves * gemm.K / tile.depth * _STEP_US

    bounds = (dram_us, l2_us, tensor_us, latency_us)
    joined = math.pow(sum(math.pow(bound, _OVERLAP) for bound in bounds), 1 / _OVERLAP)
    spilled = max(0, tile.accumulators + _BASE_REGISTERS - 255)
    return joined * (1 + _SPILL_COST * spilled) + whole_waves * _TILE_US


def _occupancy(machine: Machine, tile: Tile) -> int:
    """Returns how many blocks of threads fit on an SM at a time, at least one."""
    threads = tile.num_warps * 32
    registers = min(255, tile.accumulators + _BASE_REGISTERS)
    by_shared = machine.shared_bytes // (tile.shared_bytes + 1024)  # the driver reserves 1 KiB of each block
    return max(1, min(by_shared, machine.registers // (registers * threads), machine.max_threads // threads))


def _efficiency(tile: Tile) -> float:
    """Returns the share of the tensor cores' peak rate that a tile of this shape sustains."""
    instruction = (0.7 if tile.rows <= 64 else 1.0) if tile.wgmma else 0.35
    return instruction * tile.columns / (tile.columns + 32) * tile.depth / (tile.depth + 16)
