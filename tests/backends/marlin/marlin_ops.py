"""vLLM's MoE ops on a CPU: the schemas of vLLM's library, with plain torch inside that checks what the op checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moetune.backends.marlin.formats import FORMATS, Format
from moetune.backends.marlin.matrices import MarlinMatrices

_SIZES = "int size_m, int size_n, int size_k,"
_START = (
    "moe_wna16_marlin_gemm(Tensor! a, Tensor? c_or_none,Tensor! b_q_weight, Tensor? b_bias_or_none,Tensor! b_scales, "
    "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none,"
)
_MIDDLE = (
    "Tensor! workspace,Tensor sorted_token_ids,Tensor! expert_ids, Tensor! num_tokens_past_padded,"
    "Tensor! topk_weights, int moe_block_size, int top_k, bool mul_topk_weights, int b_type_id,"
)
_END = (
    " bool use_atomic_add,bool use_fp32_reduce, bool is_zp_float,int thread_k, int thread_n, int blocks_per_sm)"
    " -> Tensor"
)
GEMM = {
    "0.26.0": f"{_START}Tensor? g_idx_or_none, Tensor? perm_or_none, {_MIDDLE}{_SIZES}bool is_full_k,{_END}",
    "0.33.0": f"{_START}{_MIDDLE}{_SIZES}{_END}",
}
"""The op's schema, as `_moe_C_stable_libtorch.abi3.so` of the wheels of these versions has it."""
_ALIGN = (
    "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, "
    "Tensor! experts_ids, Tensor! num_tokens_post_pad, Tensor? maybe_expert_map) -> ()"
)
_SUM = "moe_sum(Tensor input, Tensor! output, Tensor? topk_ids=None, Tensor? expert_map=None) -> ()"

calls: list[tuple[int, int, int, int]] = []
"""(moe_block_size, thread_k, thread_n, blocks_per_sm) of each GEMM."""


@contextmanager
def defined() -> Iterator[None]:
    """Defines the ops of vLLM 0.26.0 in torch.ops._moe_C, and removes them."""
    library = torch.library.Library("_moe_C", "DEF")
    for schema, function in ((GEMM["0.26.0"], _gemm), (_ALIGN, _align), (_SUM, _sum)):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU")
    try:
        yield
    finally:
        library._destroy()
        calls.clear()


def _gemm(
    a, c_or_none, b_q_weight, b_bias_or_none, b_scales, a_scales, global_scale, b_zeros_or_none, g_idx_or_none,
    perm_or_none, workspace, sorted_token_ids, expert_ids, num_tokens_past_padded, topk_weights, moe_block_size, top_k,
    mul_topk_weights, b_type_id, size_m, size_n, size_k, is_full_k, use_atomic_add, use_fp32_reduce, is_zp_float,
    thread_k, thread_n, blocks_per_sm,
):  # fmt: skip
    assert a.shape == (size_m, size_k)
    assert a.is_contiguous()
    assert c_or_none.shape == (size_m * top_k, size_n)
    assert c_or_none.is_contiguous()
    assert b_q_weight.shape[1:] == (size_k // 16, size_n * 2)
    assert b_scales.shape[2] == size_n
    assert (a_scales, b_zeros_or_none, g_idx_or_none, perm_or_none) == (None, None, None, None)
    assert workspace.numel() >= min(size_n // 64 * (len(sorted_token_ids) // moe_block_size), 132 * 4)
    assert (use_atomic_add, use_fp32_reduce, is_zp_float, is_full_k) == (False, True, False, True)
    assert (thread_k == -1) == (thread_n == -1) == (blocks_per_sm == -1)
    calls.append((moe_block_size, thread_k, thread_n, blocks_per_sm))
    fmt = _format(b_type_id, b_scales.dtype, size_k // b_scales.shape[1])
    matrices = MarlinMatrices(fmt, b_q_weight, b_scales, global_scale)
    for block in range(int(num_tokens_past_padded) // moe_block_size):
        slots = sorted_token_ids[block * moe_block_size : (block + 1) * moe_block_size].long()
        slots = slots[slots < size_m * top_k]
        expert = int(expert_ids[block])
        products = a[slots // top_k].float() @ matrices.fp32(expert).T
        if b_bias_or_none is not None:
            products += _own_order(b_bias_or_none[expert])
        if mul_topk_weights:
            products *= topk_weights.view(-1)[slots].unsqueeze(1)
        c_or_none[slots] = products.bfloat16()
    return c_or_none.clone()


def _format(type_id: int, scale: torch.dtype, group: int) -> Format:
    names = {torch.bfloat16: "bf16", torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}
    (found,) = {
        fmt.name: fmt
        for fmt in FORMATS.values()
        if (fmt.scalar_type, fmt.scale, fmt.group) == (type_id, names[scale], group)
    }.values()
    return found


def _own_order(bias: torch.Tensor) -> torch.Tensor:
    """Undoes `marlin_permute_bias`: of 32 numbers, Marlin reads 0, 1, 8, 9, 16, 17, 24, 25, then 2, 3, 10, 11 …"""
    blocks = bias.float().view(-1, 32)
    own = torch.empty_like(blocks)
    for place in range(32):
        own[:, 2 * (place // 8) + place % 2 + 8 * (place % 8 // 2)] = blocks[:, place]
    return own.view(-1)


def _align(topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad, maybe_expert_map):
    ids = topk_ids.view(-1).long()
    assert 0 <= int(ids.min()) <= int(ids.max()) < num_experts
    local = ids if maybe_expert_map is None else maybe_expert_map[ids].long()
    sorted_token_ids.fill_(len(ids))
    at = 0
    for expert in range(int(local.max()) + 1):
        slots = (local == expert).nonzero().view(-1)
        blocks = -(-len(slots) // block_size)
        sorted_token_ids[at : at + len(slots)] = slots.int()
        experts_ids[at // block_size : at // block_size + blocks] = expert
        at += blocks * block_size
    num_tokens_post_pad.fill_(at)


def _sum(products, output, topk_ids=None, expert_map=None):
    assert products.is_contiguous()
    products = products.float()
    if expert_map is not None:
        products = torch.where((expert_map[topk_ids.long()] >= 0).unsqueeze(-1), products, 0.0)
    output.copy_(products.sum(1))
