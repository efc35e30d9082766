"""Lists Marlin's tactics, and says why a device cannot run the others.

Sources: `csrc/libtorch_stable/moe/marlin_moe_wna16/ops.cu`, `marlin_template.h` and `generate_kernels.py` of vLLM
0.26. The checks of `is_valid_config` are repeated here, because an illegal tactic raises only when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, Self

from moetune.backends.base import Candidates
from moetune.backends.device import Device
from moetune.backends.marlin.formats import Format
from moetune.backends.marlin.formulas import BLOCK_SIZES_M
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

AUTO: Final = "auto"
"""The kernel's own choice of thread_k, thread_n and blocks_per_sm. The engines pass nothing else."""
MOST_BLOCKS: Final = 4
"""The engines' workspace has locks for this many blocks a multiprocessor (`marlin_make_workspace_new`)."""
_STAGES: Final = 4
_REGISTERS: Final = {8: 128, 16: 160, 32: 216, 48: 255, 64: 255}
"""The most registers that a thread needs, by block_size_m.

Of vLLM 0.26.0's bf16 kernels for the formats here. Its wheel has them for Hopper as PTX only, which the driver
compiles. Neither ptxas 13.0.88, of the same CUDA version as the driver 580, nor 13.4 needs more for 9.0.
"""
_SPARE_REGISTERS: Final = 256
"""What the op leaves of a multiprocessor's registers when it chooses blocks_per_sm (`device_max_reg_size`)."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one GEMM is cut: a block of threads computes thread_n columns, thread_k values along K at a time."""

    thread_k: int
    thread_n: int
    blocks_per_sm: int

    @property
    def threads(self) -> int:
        """The threads of a block, as the op computes them."""
        return self.thread_k * self.thread_n // 64

    def __str__(self) -> str:
        """Returns the spelling in a tactic: `128x64x2`."""
        return f"{self.thread_k}x{self.thread_n}x{self.blocks_per_sm}"

    @classmethod
    def parse(cls, spelled: str) -> Self:
        """Returns the tile of a spelling."""
        return cls(*map(int, spelled.split("x")))


@dataclass(frozen=True, slots=True)
class Gemm:
    """One GEMM: its columns N, its depth K, and the values along K that share a scale."""

    N: int
    K: int
    group: int

    def obstacle(self, block_size_m: int, tile: Tile, device: Device) -> str | None:
        """Returns why the op refuses a tile, or why its blocks would wait for each other forever; else None."""
        if self.N % tile.thread_n:
            return f"N = {self.N} is not divisible by thread_n = {tile.thread_n}"
        if self.K % tile.thread_k:
            return f"K = {self.K} is not divisible by thread_k = {tile.thread_k}"
        if tile.threads == 256 and (tile.thread_k == 128) != (block_size_m <= 16):
            return f"vLLM compiles no kernel of {tile.thread_k}x{tile.thread_n} for block_size_m = {block_size_m}"
        share = device.shared_bytes
        if tile.blocks_per_sm > 1:
            share = share // tile.blocks_per_sm - 1024
        needed = self.shared_bytes(block_size_m, tile)
        if needed > share:
            return f"needs {needed} bytes of shared memory a block, has {share}"
        registers = _REGISTERS[block_size_m] * tile.threads * tile.blocks_per_sm
        if registers > device.registers - _SPARE_REGISTERS:
            # a block waits for the partial sums of a later one, so all blocks must be resident
            return f"needs {registers} registers a multiprocessor, has {device.registers - _SPARE_REGISTERS}"
        return None

    def shared_bytes(self, block_size_m: int, tile: Tile) -> int:
        """Returns the shared memory of a block: `get_kernel_cache_size` for 4 bits, 16-bit inputs, no zero points."""
        rows = -(-block_size_m // 16) * 16
        weights = _STAGES * tile.thread_k * tile.thread_n // 2
        reduced, bias = rows * (tile.thread_n + 8) * 2, tile.thread_n * 2
        shared_by_turns = max(weights, reduced, min(weights, reduced) + bias)
        scales = -(-tile.thread_k // self.group) * tile.thread_n * 2 * _STAGES
        return shared_by_turns + _STAGES * rows * tile.thread_k * 2 + scales + rows * 16


def gemms(layer: MoELayer, regime: Regime, fmt: Format) -> tuple[Gemm, Gemm]:
    """Returns both GEMMs of a rank, in padded sizes. `Format.padded` has to accept the sizes."""
    padded = fmt.padded(layer.hidden_size, regime.intermediate_size(layer))
    assert padded is not None
    hidden, intermediate = padded
    return (
        Gemm(layer.activation.halves * intermediate, hidden, fmt.group),
        Gemm(hidden, intermediate, fmt.group),
    )


def tiles() -> Iterator[Tile]:
    """Yields the tiles of all kernels that vLLM compiles, with each number of blocks a multiprocessor."""
    for (thread_k, thread_n), blocks in product(
        ((128, 128), (64, 256), (64, 128), (128, 64)), range(1, MOST_BLOCKS + 1)
    ):
        yield Tile(thread_k, thread_n, blocks)


def tactic_of(block_size_m: int, gemm1: str = AUTO, gemm2: str = AUTO) -> Tactic:
    """Returns a tactic: one block size for both GEMMs, and the tile of each, a spelling or `AUTO`."""
    return Tactic(block_size_m=block_size_m, gemm1=gemm1, gemm2=gemm2)


def block_sizes(default: Tactic) -> Candidates:
    """Returns every block size with the kernel's own tiles, the default first."""
    return Candidates(tuple(dict.fromkeys((default, *map(tactic_of, BLOCK_SIZES_M)))))


def candidates(both: tuple[Gemm, Gemm], default: Tactic, device: Device) -> Candidates:
    """Returns every block size with every pair of tiles that the device runs, the default first."""
    tactics = {default: None}
    excluded: dict[Tactic, str] = {}
    for block_size_m in BLOCK_SIZES_M:
        legal: list[list[str]] = []
        for name, gemm in zip(("gemm1", "gemm2"), both, strict=True):
            reasons = {tile: gemm.obstacle(block_size_m, tile, device) for tile in tiles()}
            legal.append([AUTO, *(str(tile) for tile, reason in reasons.items() if reason is None)])
            excluded |= {
                Tactic({"block_size_m": block_size_m, name: str(tile)}): reason
                for tile, reason in reasons.items()
                if reason is not None
            }
        tactics |= dict.fromkeys(tactic_of(block_size_m, first, second) for first, second in product(*legal))
    return Candidates(tuple(tactics), excluded)
