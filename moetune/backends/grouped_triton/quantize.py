"""e4m3 with one f32 scale for each 1×128 of an activation and each 128×128 of a weight."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 128
E4M3_MAX = 448.0
SMALLEST_MAXIMUM = 1e-10
"""A group's largest magnitude is taken to be at least this, so that no scale is 0 (vLLM, SGLang)."""
_GROUPS_PER_PROGRAM = 16


def quantize_rows(x: torch.Tensor, quantized: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantizes contiguous bf16 `x` [rows, K] into e4m3 `quantized` [rows, K] and f32 `scales` [rows, K / 128].

    A group of 128 values x gets the scale s = max|x| / 448 and the values x / s, rounded to nearest even.
    """
    num_groups = x.numel() // GROUP
    grid = (triton.cdiv(num_groups, _GROUPS_PER_PROGRAM),)
    _quantize_groups[grid](
        x,
        quantized,
        scales,
        num_groups,
        GROUP=GROUP,
        GROUPS_PER_PROGRAM=_GROUPS_PER_PROGRAM,
        E4M3_MAX=E4M3_MAX,
        SMALLEST_MAXIMUM=SMALLEST_MAXIMUM,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_groups"])
def _quantize_groups(
    x_ptr,
    quantized_ptr,
    scales_ptr,
    num_groups,
    GROUP: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    SMALLEST_MAXIMUM: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * GROUPS_PER_PROGRAM + tl.arange(0, GROUPS_PER_PROGRAM)
    inside = groups < num_groups
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST_MAXIMUM) * (1.0 / E4M3_MAX)
    scaled = tl.clamp(x / scales[:, None], -E4M3_MAX, E4M3_MAX)
    tl.store(quantized_ptr + offsets, scaled.to(quantized_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(scales_ptr + groups, scales, mask=inside)


def quantize_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_rows` computes, in plain torch: e4m3 `[rows, K]` and f32 `[rows, K / 128]`."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1).clamp(min=SMALLEST_MAXIMUM) * (1.0 / E4M3_MAX)
    scaled = (groups / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.flatten(-2).to(torch.float8_e4m3fn), scales


def quantize_weight(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's weight `[N, K]` as e4m3 `[N, K]` and f32 `[N / 128, K / 128]`."""
    tiles = w.float().unflatten(0, (-1, GROUP)).unflatten(-1, (-1, GROUP))
    scales = tiles.abs().amax((1, 3)).clamp(min=SMALLEST_MAXIMUM) / E4M3_MAX
    scaled = (tiles / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.flatten(2).flatten(0, 1).to(torch.float8_e4m3fn), scales


def dequantize_rows(quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The f32 values of `quantize_rows`' result."""
    groups: torch.Tensor = quantized.float().unflatten(-1, (-1, GROUP))
    return (groups * scales.unsqueeze(-1)).flatten(-2)


def dequantize_weight(quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The f32 values of `quantize_weight`'s result."""
    return quantized.float() * scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
