"""The batched GEMM: the filled rows of each expert's block times that expert's weights; and the activation between."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024
_ROW_LANES = 64


@triton.jit
def batched_gemm_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    counts_ptr,
    a_scales_ptr,
    w_scales_ptr,
    N,
    K,
    stride_ae: tl.int64,
    stride_am: tl.int64,
    stride_ak: tl.int64,
    stride_we: tl.int64,
    stride_wn: tl.int64,
    stride_wk: tl.int64,
    stride_oe: tl.int64,
    stride_om: tl.int64,
    stride_on: tl.int64,
    stride_ase: tl.int64,
    stride_asm: tl.int64,
    stride_ask: tl.int64,
    stride_wse: tl.int64,
    stride_wsn: tl.int64,
    stride_wsk: tl.int64,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """`out[e, r] = a[e, r] @ w[e].T` for the first `counts[e]` rows r of each expert e. The others stay as they are.

    `a` [L, capacity, K] and `w` [L, N, K], bf16 or e4m3; `out` bf16 [L, capacity, N]; `counts` int32 [L]; fp32
    accumulation. With `SCALE_BLOCK` (e4m3 only) `a_scales` is f32 [L, capacity, ceil(K / SCALE_BLOCK)] and `w_scales`
    f32 [L, ceil(N / SCALE_BLOCK), ceil(K / SCALE_BLOCK)]; BLOCK_SIZE_K must divide SCALE_BLOCK.

    Program (e, t) computes tile t of expert e, BLOCK_SIZE_M × BLOCK_SIZE_N, where the columns of a row of tiles come
    first, as in vLLM. A tile without filled rows ends at once.

    All strides are 64-bit run-time numbers, as in vLLM's kernel. So Triton does not know that values along K are
    neighbors, and keeps no software pipeline: what is fastest with a pipeline is not what is fastest in vLLM.
    """
    expert = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + expert)
    num_blocks_n = tl.cdiv(N, BLOCK_SIZE_N)
    first_row = tl.program_id(1) // num_blocks_n * BLOCK_SIZE_M
    if first_row >= count:
        return
    first_column = tl.program_id(1) % num_blocks_n * BLOCK_SIZE_N

    # the tile's corner is one scalar address, so the addresses in a tile take few registers
    a_ptr += expert * stride_ae + first_row * stride_am
    w_ptr += expert * stride_we + first_column * stride_wn
    out_ptr += expert * stride_oe + first_row * stride_om + first_column * stride_on
    rows = tl.arange(0, BLOCK_SIZE_M)
    filled = rows < count - first_row
    columns = tl.arange(0, BLOCK_SIZE_N)
    wrapped = columns % tl.minimum(BLOCK_SIZE_N, N - first_column)
    depth = tl.arange(0, BLOCK_SIZE_K)
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth[None, :] * stride_ak
    w_ptrs = w_ptr + depth[:, None] * stride_wk + wrapped[None, :] * stride_wn
    if SCALE_BLOCK > 0:
        a_scale_ptrs = a_scales_ptr + expert * stride_ase + first_row * stride_asm + rows * stride_asm
        blocks = (first_column + columns.to(tl.int64)) % N // SCALE_BLOCK
        w_scale_ptrs = w_scales_ptr + expert * stride_wse + blocks * stride_wsn

    accumulator = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for step in range(tl.cdiv(K, BLOCK_SIZE_K)):
        inside = depth < K - step * BLOCK_SIZE_K
        a = tl.load(a_ptrs, mask=filled[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        if SCALE_BLOCK > 0:
            group = step * BLOCK_SIZE_K // SCALE_BLOCK
            a_scale = tl.load(a_scale_ptrs + group * stride_ask, mask=filled, other=0.0)
            w_scale = tl.load(w_scale_ptrs + group * stride_wsk)
            accumulator += tl.dot(a, w) * a_scale[:, None] * w_scale[None, :]
        else:
            accumulator += tl.dot(a, w)
        a_ptrs += BLOCK_SIZE_K * stride_ak
        w_ptrs += BLOCK_SIZE_K * stride_wk

    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_on
    mask = filled[:, None] & (columns[None, :] < N - first_column)
    tl.store(out_ptrs, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


def activate_filled(gate_up: torch.Tensor, out: torch.Tensor, counts: torch.Tensor, *, gelu: bool) -> None:
    """`out[e, r] = f(gate_up[e, r, :I]) · gate_up[e, r, I:]` for the first `counts[e]` rows r of every expert e.

    f is silu or tanh-gelu; bf16 `[L, capacity, 2I]` and `[L, capacity, I]`, contiguous; int32 `[L]`. It is computed in
    fp32 and rounded once. The other rows stay as they are.
    """
    num_local, capacity, width = out.shape
    grid = (num_local, min(capacity, _ROW_LANES), triton.cdiv(width, _COLUMNS))
    _activate_filled[grid](gate_up, out, counts, capacity, width, COLUMNS=_COLUMNS, GELU=gelu)


@triton.jit(do_not_specialize=["capacity"])
def _activate_filled(gate_up_ptr, out_ptr, counts_ptr, capacity, width, COLUMNS: tl.constexpr, GELU: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + expert)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    for in_block in range(tl.program_id(1), count, tl.num_programs(1)):
        row = expert * capacity + in_block
        gate_ptrs = gate_up_ptr + row * 2 * width + columns
        gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptrs + width, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            # tanh-gelu(x) = x · sigmoid(2 · sqrt(2 / pi) · (x + 0.044715 · x³))
            gated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        else:
            gated = gate * tl.sigmoid(gate)
        tl.store(out_ptr + row * width + columns, (gated * up).to(out_ptr.dtype.element_ty), mask=inside)
