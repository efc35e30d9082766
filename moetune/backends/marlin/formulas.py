"""Computes the `block_size_m` that engines choose for Marlin without a table."""

from __future__ import annotations

import math
from typing import Final, Literal

Formula = Literal["vllm", "sglang"]
"""Whose formula names the default: that of vLLM 0.26.0 … 0.33.0, or of SGLang 0.5.23."""

BLOCK_SIZES_M: Final = (8, 16, 32, 48, 64)
_FILLED: Final = 0.9


def block_size_m(formula: Formula, rows: int, top_k: int, num_local: int, num_experts: int) -> int:
    """Returns the block size that an engine chooses: the first of which a mean expert fills less than 0.9, or 64.

    SGLang (`fused_moe_triton/fused_marlin_moe.py`) divides all slots by the local experts. vLLM (`fused_marlin_moe` in
    `experts/marlin_moe.py`, since #48144) first takes the rows that a rank gets if all experts are equally busy.

    Args:
        formula: whose formula.
        rows: M, the rows in the kernel.
        top_k: the number of ids in a row.
        num_local: L, the experts of the rank.
        num_experts: all physical experts, those of other ranks too.
    """
    counted = math.ceil(rows * num_local / num_experts) if formula == "vllm" else rows
    load = counted * top_k / num_local
    return next((size for size in BLOCK_SIZES_M if load / size < _FILLED), BLOCK_SIZES_M[-1])
