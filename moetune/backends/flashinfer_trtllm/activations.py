"""Describes the five kinds of activations that the trtllm-gen kernels multiply weights with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetune.backends.flashinfer_trtllm import grids
from moetune.backends.flashinfer_trtllm.grids import Grid

if TYPE_CHECKING:
    import torch


def dtype_number(block_format: int, integer: int, bits: int, uid: int) -> int:
    """Returns the number of a signed `DtypeTrtllmGen`."""
    return (block_format << 24) | (1 << 20) | (integer << 16) | (bits << 8) | uid


@dataclass(frozen=True, slots=True)
class Activations:
    """Describes the activations that weights are multiplied with.

    `quant`: the name in FlashInfer's `QuantFormat`. `number`: that of `DtypeTrtllmGen`. `dtype`: torch's name.
    `tolerance`: a tactic's largest relative error. Weights and inputs are on their grids, so only rounding the
    intermediate causes errors, of 2⁻⁹, 2⁻⁴ or 2⁻² at most. `packed_width`: values in one element of a row.
    `scale_block`: values that share a scale. `blocks_first`: scales are f32 `[H/block, M]`, else bytes `[M, H/block]`.
    """

    quant: str
    number: int
    dtype: str
    tolerance: float
    grid: Grid | None = None
    packed_width: int = 1
    scale_block: int | None = None
    blocks_first: bool = False

    def shapes(self, rows: int, hidden: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Returns the shape of M rows, and that of their block scales or None."""
        values = rows, hidden // self.packed_width
        if self.scale_block is None:
            return values, None
        blocks = hidden // self.scale_block
        return values, (blocks, rows) if self.blocks_first else (rows, blocks)

    def meta(self, rows: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns M rows without storage, and their block scales or None."""
        import torch

        values, scales = self.shapes(rows, hidden)
        dtype = torch.float32 if self.blocks_first else torch.float8_e4m3fn
        made = torch.empty(values, dtype=getattr(torch, self.dtype), device="meta")
        return made, None if scales is None else torch.empty(scales, dtype=dtype, device="meta")


E4M3 = dtype_number(0, 0, 8, 5)
BF16 = Activations("BF16", dtype_number(0, 0, 16, 0), "bfloat16", 2e-2)
FP8_BLOCK = Activations(
    "DeepSeekFp8", E4M3, "float8_e4m3fn", 8e-2, grids.E4M3_BLOCK, scale_block=128, blocks_first=True
)
FP8_TENSOR = Activations("FP8PerTensor", E4M3, "float8_e4m3fn", 8e-2, grids.E4M3_BLOCK)
NVFP4 = Activations("NVFP4", dtype_number(1, 0, 4, 2), "uint8", 0.2, grids.NVFP4, packed_width=2, scale_block=16)
MXFP8 = Activations("MXFP8", dtype_number(1, 0, 8, 13), "float8_e4m3fn", 8e-2, grids.E4M3_MX, scale_block=32)
