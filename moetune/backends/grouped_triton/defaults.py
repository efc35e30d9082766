"""Computes the tactics that vLLM and SGLang run without a tuned file."""

from __future__ import annotations

from moetune.backends.grouped_triton.kernel_versions import NEWEST, KernelVersion
from moetune.backends.grouped_triton.space import SCALE_BLOCK, Shapes, tactic_of
from moetune.spec.tactic import Tactic


def default_config(rows: int, num_local: int, fp8: bool, version: KernelVersion = NEWEST) -> Tactic:
    """Returns what vLLM runs without a tuned file, as `get_default_config` of vLLM 0.19.1 … 0.33.0 does.

    fp8 with block scales has one tile for up to 64 rows and one for more; up to 8 rows the tile is narrower from
    0.25 on. In bf16 the tile grows with the rows, and rows are grouped only if an expert has more than 128 of them.
    """
    if fp8:
        block_n = SCALE_BLOCK // 2 if version.narrow_default and rows <= 8 else SCALE_BLOCK
        group, stages = 1 if rows <= 16 else 32, 4 if version.narrow_default and rows <= 4 else 3
        return tactic_of(16 if rows <= 64 else 64, block_n, SCALE_BLOCK, group, 4, stages)
    block_m = next((size for most, size in ((32, 16), (96, 32), (512, 64)) if rows <= most), 128)
    return tactic_of(
        block_m,
        64 if rows <= 64 else 128,
        128 if rows <= 64 else 64,
        16 if rows // max(num_local, 1) > 128 else 1,
        4 if rows <= 128 else 8,
        4 if rows <= 32 else 3,
    )


def sglang_default_config(rows: int, num_local: int, fp8: bool) -> Tactic:
    """Returns what SGLang runs without a tuned file, as `get_default_config` of SGLang 0.5.23 does.

    fp8 with block scales has one tile for any rows. bf16 has a small tile for up to as many rows as local experts. For
    more rows its tile has BLOCK_SIZE_K 32 and groups of 8, which is none of the 1920 configurations. Warps and stages
    are Triton's own defaults.
    """
    if fp8:
        return tactic_of(64, SCALE_BLOCK, SCALE_BLOCK, 32, 4, 3)
    return tactic_of(16, 32, 64, 1, 4, 3) if rows <= num_local else tactic_of(64, 64, 32, 8, 4, 3)


def engine_default(shapes: Shapes) -> Tactic:
    """Returns the default of the kernel's engine: SGLang's for its own kernel, else vLLM's."""
    if shapes.sglang:
        return sglang_default_config(shapes.rows, shapes.num_local, shapes.fp8)
    return default_config(shapes.rows, shapes.num_local, shapes.fp8, shapes.version)
