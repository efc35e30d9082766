"""Draws random values that a quantized format holds without loss.

So the reference multiplies exactly the numbers that the kernel does, and a quantizer's rounding cannot hide a wrong
layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moetune.backends.prepared import E4M3_MAX

if TYPE_CHECKING:
    import torch

_E2M1_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Grid:
    """Describes the values of a quantized format.

    They are numbers of `kind`. Each block of `block` values has one of magnitude `largest`, so every quantizer finds
    the same scale, a power of two, and rounds nothing. `deviation` is that of the normal values that are rounded to the
    grid.
    """

    kind: Literal["e2m1", "e4m3", "int4"]
    block: int
    largest: float
    deviation: float

    def unit(self, deviation: float) -> float:
        """Returns the power of two that scales the grid's numbers to about `deviation`."""
        own = math.hypot(self.deviation, self.largest / math.sqrt(self.block))
        return 2.0 ** round(math.log2(deviation / own))


E4M3_BLOCK = Grid("e4m3", 128, E4M3_MAX, 112.0)
E4M3_MX = Grid("e4m3", 32, E4M3_MAX, 112.0)
NVFP4 = Grid("e2m1", 16, 6.0, 2.0)
MXFP4 = Grid("e2m1", 32, 6.0, 2.0)
MXINT4 = Grid("int4", 32, -8.0, 2.5)


def draw(grid: Grid | None, rows: int, columns: int, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Draws bf16 `[rows, columns]` of about `deviation`: a power of two times the grid's numbers, or normal values."""
    import torch

    values = torch.randn(rows, columns, generator=generator, device=generator.device)
    if grid is None:
        return values.mul_(deviation).bfloat16()
    values.mul_(grid.deviation)
    match grid.kind:
        case "e2m1":
            steps = torch.tensor(_E2M1_STEPS, device=values.device)
            values = steps[torch.bucketize(values.abs(), (steps[1:] + steps[:-1]) / 2)] * values.sign()
        case "e4m3":
            values = values.clamp_(-grid.largest, grid.largest).to(torch.float8_e4m3fn).float()
        case "int4":
            values = values.round_().clamp_(-8, 7)
    first = values[:, :: grid.block]
    # int4 has no 8, only −8. Elsewhere signs are random; otherwise the blocks' first columns would add up in a GEMM.
    values[:, :: grid.block] = (
        grid.largest if grid.largest < 0 else torch.copysign(first.new_tensor(grid.largest), first)
    )
    return values.mul_(grid.unit(deviation)).bfloat16()
