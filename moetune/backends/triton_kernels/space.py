"""Lists the tactics of `matmul_ogs` for mxfp4 weights on Hopper, and says why others cannot run.

A tactic has `Flags` for each GEMM. They are the constraints that `matmul_ogs` takes and that change what it runs here.
What it does not leave open, in triton_kernels of Triton 3.5.1:
- num_warps and block_n. Scales are stored in an order that depends on the number of warps (`HopperMXScaleLayout`), and
  vLLM stores them for 8. The kernel reads that order with 8 warps only, and in tiles of 256 columns.
- is_persistent. The persistent kernel refuses mxfp4 weights on Hopper, as TMA cannot load them there. epilogue_subtile
  and idle_sms change that kernel only.
- fused_scatter. `matmul_ogs` refuses it for more than one id in a row, and sets it itself for one.

Sources: `matmul_ogs.py`, `matmul_ogs_details/{_matmul_ogs,opt_flags}.py`, `opt_flags_details/opt_flags_nvidia.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final, Self

from moetune.backends.base import Candidates
from moetune.backends.device import Device
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

NUM_WARPS: Final = 8
"""For which vLLM stores scales (`_swizzle_mxfp4` in `quantization/utils/mxfp4_utils.py`)."""
BLOCK_N: Final = 256
"""The columns of a tile: 32 for each of these warps."""
LEAST_N: Final = 128
"""A GEMM of no more columns gets narrower tiles, which 8 warps cannot read (`compute_block_n`)."""
GROUP: Final = 32
"""The values along K that share a scale."""
MULTIPLE: Final = 64
"""Of which H and I/tp are multiples, so that a thread's part of the stored order is whole; vLLM pads I/tp to it."""
DEPTH: Final = 128
"""To a multiple of this vLLM pads the scales along K (#47910), because the kernel reads them without a mask."""
BLOCK_SIZES_M: Final = (16, 32, 64, 128)
"""For which the routing lists blocks (`routing.py`)."""
BLOCK_SIZES_K: Final = (64, 128, 256)
STAGES: Final = (2, 3, 4, 6)
SPLITS: Final = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Flags:
    """The constraints of one GEMM, by the names that `update_opt_flags_constraints` takes."""

    block_m: int
    block_k: int
    num_stages: int
    split_k: int

    def __str__(self) -> str:
        """Returns the spelling in a tactic: `16x128x4x1`."""
        return f"{self.block_m}x{self.block_k}x{self.num_stages}x{self.split_k}"

    @classmethod
    def parse(cls, spelled: str) -> Self:
        """Returns the flags of a spelling."""
        return cls(*map(int, spelled.split("x")))

    @property
    def constraints(self) -> dict[str, int]:
        """The flags by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def shared_bytes(self) -> int:
        """The most shared memory of a block: num_stages − 1 tiles of inputs, weights and scales, and a tile of inputs.

        Triton 3.6 and 3.9 take as much for block_k = 128, and less for 64, where scales have no place of their own.
        """
        inputs, weights = self.block_m * self.block_k * 2, self.block_k * BLOCK_N // 2
        scales = BLOCK_N * self.block_k // GROUP
        return (self.num_stages - 1) * (inputs + weights + scales) + inputs


@dataclass(frozen=True, slots=True)
class Gemm:
    """One GEMM of all experts: the slots of all rows, non-local ones too, its columns N and its depth K."""

    slots: int
    N: int
    K: int

    def obstacle(self, flags: Flags, device: Device) -> str | None:
        """Returns why the flags would read wrong scales, not fit the device or not be worth a measurement."""
        if _up(self.K, flags.block_k) > (padded := _up(self.K, DEPTH)):
            return f"reads scales beyond those of K = {self.K}, which the engine pads to {padded} (vLLM #47910)"
        if flags.shared_bytes > device.shared_bytes:
            return f"needs {flags.shared_bytes} bytes of shared memory a block, has {device.shared_bytes}"
        if flags.split_k > (most := self.most_splits(flags, device)):
            return f"the rows and columns make enough blocks for the device with K in {most} part(s)"
        return None

    def blocks(self, block_m: int, num_local: int) -> int:
        """Returns the blocks along the slots that are launched, whatever the load (`RoutingData.n_blocks`)."""
        if self.slots <= num_local:
            return self.slots
        return -(-(self.slots - num_local + 1) // block_m) + num_local - 1

    def most_splits(self, flags: Flags, device: Device) -> int:
        """Returns the largest split_k that triton_kernels itself would choose (`compute_split_k`)."""
        blocks = -(-self.slots // flags.block_m) * -(-self.N // BLOCK_N)
        return max(1, min(device.multiprocessors // blocks, -(-self.K // flags.block_k) // 4))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def gemms(layer: MoELayer, regime: Regime, rows: int) -> tuple[Gemm, Gemm]:
    """Returns both GEMMs of a rank, with I/tp padded as in vLLM.

    Source: `mxfp4_round_up_hidden_size_and_intermediate_size` in `fused_moe/oracle/mxfp4.py` of vLLM 0.26.0 and 0.33.0.
    """
    slots = rows * regime.row_top_k(layer)
    intermediate = _up(regime.intermediate_size(layer), MULTIPLE)
    hidden = layer.hidden_size
    return Gemm(slots, 2 * intermediate, hidden), Gemm(slots, hidden, intermediate)


def tactic_of(first: Flags, second: Flags) -> Tactic:
    """Returns the tactic with these flags for the first and the second GEMM."""
    return Tactic(gemm1=str(first), gemm2=str(second))


def candidates(both: tuple[Gemm, Gemm], default: Tactic, device: Device) -> Candidates:
    """Returns each pair of flags that the device runs, the default first, and what is excluded of one GEMM."""
    legal: list[list[str]] = []
    excluded: dict[Tactic, str] = {}
    for name, gemm in zip(("gemm1", "gemm2"), both, strict=True):
        legal.append([])
        for values in product(BLOCK_SIZES_M, BLOCK_SIZES_K, STAGES, SPLITS):
            flags = Flags(*values)
            if reason := gemm.obstacle(flags, device):
                excluded[Tactic({name: str(flags)})] = reason
            else:
                legal[-1].append(str(flags))
    pairs = (Tactic(gemm1=first, gemm2=second) for first, second in product(*legal))
    return Candidates(tuple(dict.fromkeys((default, *pairs))), excluded)
