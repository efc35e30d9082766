"""The grouped GEMM: every expert's rows times that expert's weights, in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["max_padded_slots", "num_slots"])
def grouped_gemm_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    a_scales_ptr,
    w_scales_ptr,
    slot_weights_ptr,
    sorted_slots_ptr,
    block_experts_ptr,
    num_padded_slots_ptr,
    N,
    K,
    max_padded_slots,
    num_slots,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    SLOTS_PER_ROW: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SORTED: tl.constexpr,
    ZERO_REMOTE: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """`out[s] = a[s // SLOTS_PER_ROW] @ w[expert of s].T`, times the slot's router weight where `WEIGHTED`.

    `a` [rows, K] and `w` [L, N, K], bf16 or e4m3; `out` bf16 [num_slots, N]; everything contiguous; fp32 accumulation.
    With `SCALE_BLOCK` (e4m3 only) `a_scales` f32 [rows, ceil(K / SCALE_BLOCK)] and `w_scales` f32
    [L, ceil(N / SCALE_BLOCK), ceil(K / SCALE_BLOCK)]; BLOCK_SIZE_K must divide SCALE_BLOCK.

    Program p computes one BLOCK_SIZE_M × BLOCK_SIZE_N tile; the order walks down GROUP_SIZE_M blocks of rows before
    the next column, as vLLM's and SGLang's kernels do. Not `SORTED`: block b holds slot b alone.
    `ZERO_REMOTE`: blocks of expert −1 write zeros. `SWAP_AB` computes the tile's transpose, so that the
    columns fill the 64-row side of Hopper's wgmma (sglang#15712).
    """
    num_blocks_m = tl.cdiv(max_padded_slots, BLOCK_SIZE_M)
    num_blocks_n = tl.cdiv(N, BLOCK_SIZE_N)
    pid = tl.program_id(0)
    block_m, block_n = tl.swizzle2d(pid // num_blocks_n, pid % num_blocks_n, num_blocks_m, num_blocks_n, GROUP_SIZE_M)
    if block_m * BLOCK_SIZE_M >= tl.load(num_padded_slots_ptr):
        return

    lanes = tl.arange(0, BLOCK_SIZE_M)
    if SORTED:
        slots = tl.load(sorted_slots_ptr + block_m * BLOCK_SIZE_M + lanes).to(tl.int64)
    else:
        slots = tl.where(lanes == 0, block_m, num_slots).to(tl.int64)
    real = slots < num_slots
    expert = tl.load(block_experts_ptr + block_m).to(tl.int64)
    if ZERO_REMOTE and expert < 0:
        zeros = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=out_ptr.dtype.element_ty)
        _store_tile(out_ptr, zeros, slots, real, block_n, N, BLOCK_SIZE_N)
        return

    rows = slots // SLOTS_PER_ROW
    columns = (block_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N).to(tl.int64)) % N
    depth = tl.arange(0, BLOCK_SIZE_K)
    w_ptr += expert * N * K
    if SWAP_AB:
        a_ptrs = a_ptr + (rows[None, :] * K + depth[:, None])
        w_ptrs = w_ptr + (columns[:, None] * K + depth[None, :])
        accumulator = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), dtype=tl.float32)
    else:
        a_ptrs = a_ptr + (rows[:, None] * K + depth[None, :])
        w_ptrs = w_ptr + (columns[None, :] * K + depth[:, None])
        accumulator = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    if SCALE_BLOCK > 0:
        scale_depth = tl.cdiv(K, SCALE_BLOCK)
        a_scale_ptrs = a_scales_ptr + rows * scale_depth
        w_scales_ptr += expert * tl.cdiv(N, SCALE_BLOCK) * scale_depth
        w_scale_ptrs = w_scales_ptr + columns // SCALE_BLOCK * scale_depth

    for step in range(tl.cdiv(K, BLOCK_SIZE_K)):
        start = step * BLOCK_SIZE_K  # added to each pointer: one uniform register, not an increment for every load
        inside = depth < K - start
        if SWAP_AB:
            a = tl.load(a_ptrs + start, mask=real[None, :] & inside[:, None], other=0.0)
            w = tl.load(w_ptrs + start, mask=inside[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs + start, mask=real[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptrs + start, mask=inside[:, None], other=0.0)
        if SCALE_BLOCK > 0:
            group = start // SCALE_BLOCK
            a_scale = tl.load(a_scale_ptrs + group, mask=real, other=0.0)
            w_scale = tl.load(w_scale_ptrs + group)
            if SWAP_AB:
                accumulator += tl.dot(w, a) * w_scale[:, None] * a_scale[None, :]
            else:
                accumulator += tl.dot(a, w) * a_scale[:, None] * w_scale[None, :]
        elif SWAP_AB:
            accumulator += tl.dot(w, a)
        else:
            accumulator += tl.dot(a, w)

    if SWAP_AB:
        accumulator = tl.trans(accumulator)
    if WEIGHTED:
        accumulator *= tl.load(slot_weights_ptr + slots, mask=real, other=0.0)[:, None]
    _store_tile(out_ptr, accumulator.to(out_ptr.dtype.element_ty), slots, real, block_n, N, BLOCK_SIZE_N)


@triton.jit
def _store_tile(out_ptr, tile, slots, real, block_n, N, BLOCK_SIZE_N: tl.constexpr):
    columns = block_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    mask = real[:, None] & (columns[None, :] < N)
    tl.store(out_ptr + slots[:, None] * N + columns[None, :], tile, mask=mask)
