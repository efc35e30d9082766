"""Small packages named `vllm` and `sglang`, with the modules in which Marlin's block size is chosen."""

from __future__ import annotations

from pathlib import Path

OPS = """
calls = []
def moe_wna16_marlin_gemm(
    input, output, b_qweight, b_bias, b_scales, a_scales, global_scale, b_qzeros, {act_order}workspace,
    sorted_token_ids, expert_ids, num_tokens_past_padded, topk_weights, moe_block_size, top_k, mul_topk_weights,
    b_q_type, size_m, size_n, size_k, {k_full}use_atomic_add, use_fp32_reduce, is_zp_float, thread_k=-1, thread_n=-1,
    blocks_per_sm=-1,
):
    assert sorted_token_ids == ("slots", moe_block_size), "aligned to another block size"
    calls.append((moe_block_size, thread_k, thread_n, blocks_per_sm))
    return output
def moe_sum(input, output, topk_ids=None, expert_map=None):
    calls.append("sum")
"""
VLLM = """
from __future__ import annotations
import math
from collections.abc import Callable
import torch
import vllm._custom_ops as ops
class MoEActivation:
    SILU = "silu"
    is_gated = True
class ScalarType:
    from_id = staticmethod(lambda number: number)
class scalar_types:
    uint4, uint8b128, float8_e4m3fn, uint4b8, float4_e2m1f = 1, 2, 3, 1125899907892224, 562949953487106
def apply_moe_activation(*given, **named):
    pass
ApplyMoEActivationConfig = dict
def _resize_cache(cache, shape):
    return cache.view(-1)[: math.prod(shape)].view(shape)
def marlin_moe_intermediate_size(w1, w2):
    return w2.size(1) * 16
def marlin_make_workspace_new(device, blocks=1):
    return torch.zeros(1)
get_marlin_workspace = marlin_make_workspace_new
def moe_align_block_size(topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False,
                         ignore_invalid_experts=False):
    return ("slots", block_size), "experts", "padded"
"""
VLLM_CALL = """
def ask(**named):
    MoEActivation.SILU = MoEActivation
    fused_marlin_moe(bias1=None, bias2=None, w2_scale=None, activation=MoEActivation, **named)
    calls, ops.calls[:] = list(ops.calls), []
    assert calls.pop() == "sum"
    return calls
"""
VLLM_PLANTED = """
def fused_marlin_moe(hidden_states, w1, w2, bias1, bias2, w1_scale, w2_scale, topk_weights, topk_ids, quant_type_id,
                     global_num_experts=-1, activation=None, expert_map=None, w1_zeros=None, input_dtype=None):
    M, E, topk = topk_ids.size(0), w1.size(0), topk_ids.size(1)
    for block_size_m in [8, 16, 32, 48, 64]:
        if math.ceil(M * E / global_num_experts) * topk / E / block_size_m < 0.9:
            break
    slots, experts, padded = moe_align_block_size(topk_ids, block_size_m, global_num_experts, expert_map)
    rest = dict.fromkeys(("top_k", "mul_topk_weights", "b_q_type", "size_m", "size_n", "size_k", "is_k_full",
                          "use_atomic_add", "use_fp32_reduce", "is_zp_float"))
    for w in (w1, w2):
        ops.moe_wna16_marlin_gemm(hidden_states, None, w, *[None] * 8, slots, experts, padded, topk_weights,
                                  moe_block_size=block_size_m, **rest)
    ops.moe_sum(None, None)
"""
"""The parts of vLLM's function that matter here."""
SGLANG_PACKAGE = """
def moe_align_block_size(topk_ids, block_size, num_experts, return_inactive_prefix_count=False):
    return ("slots", block_size), "experts", "padded"
"""
SGLANG = """
from __future__ import annotations
from typing import Optional
import torch
from sglang.kernels import calls
class zero_copy_context:
    get_moe_output = staticmethod(lambda hidden_states: hidden_states)
def get_scalar_type(*given):
    return "a type"
def register_custom_op(**named):
    return lambda function: function
def silu_and_mul(*given):
    pass
moe_sum_reduce = silu_and_mul
def moe_wna16_marlin_gemm(
    a, c, b_q_weight, b_bias, b_scales, global_scale, b_zeros, g_idx, perm, workspace, sorted_token_ids, *given,
    moe_block_size, **named,
):
    assert sorted_token_ids == ("slots", moe_block_size), "aligned to another block size"
    calls.append((moe_block_size, -1, -1, -1))
    return c
"""
SGLANG_PLANTED = """
def fused_marlin_moe(hidden_states, w1, w2, w1_scale, w2_scale, gating_output, topk_weights, topk_ids,
                     global_num_experts=-1, expert_map=None, w1_zeros=None, num_bits=8):
    M, E, topk = hidden_states.shape[0], w1.shape[0], topk_ids.shape[1]
    from sglang.srt.layers.moe.fused_moe_triton import moe_align_block_size
    for block_size_m in [8, 16, 32, 48, 64]:
        if M * topk / E / block_size_m < 0.9:
            break
    if M == 1:
        slots = "slots", block_size_m
    else:
        slots, _, _ = moe_align_block_size(topk_ids, block_size_m, global_num_experts, return_inactive_prefix_count=1)
    for w in (w1, w2):
        moe_wna16_marlin_gemm(hidden_states, None, w, *[None] * 7, slots, moe_block_size=block_size_m)
"""
SGLANG_CALL = """
def ask(*, quant_type_id, expert_map, **named):
    given = [named.pop(name) for name in ("hidden_states", "w1", "w2", "w1_scale")]
    fused_marlin_moe(*given, given[-1], named["topk_weights"], num_bits=4, **named)
    found, calls[:] = list(calls), []
    return found
"""
MODULES = {
    "vllm": "vllm.model_executor.layers.fused_moe.experts.marlin_moe",
    "sglang": "sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe",
}


def plant(root: Path, engine: str, functions: str | None = None, *, act_order: bool = True, extra: str = "") -> None:
    """Writes the package of an engine below `root`.

    Args:
        root: the folder.
        engine: `vllm` or `sglang`.
        functions: the source of the engine's functions. [default: `VLLM_PLANTED` or `SGLANG_PLANTED`]
        act_order: whether vLLM's op has the arguments that 0.26.0 has and 0.33.0 has not.
        extra: more source for the module.
    """
    files = {
        "vllm/_custom_ops.py": OPS.format(
            act_order="g_idx, perm, " if act_order else "", k_full="is_k_full, " if act_order else ""
        ),
        "vllm/envs.py": "VLLM_BATCH_INVARIANT = False\nVLLM_MARLIN_MOE_BLOCK_SIZE_M = None\n",
        f"{MODULES['vllm'].replace('.', '/')}.py": VLLM + (functions or VLLM_PLANTED) + VLLM_CALL + extra,
    }
    if engine == "sglang":
        path = MODULES["sglang"].replace(".", "/")
        files = {
            "sglang/kernels.py": "calls = []\n",
            f"{path.rpartition('/')[0]}/__init__.py": SGLANG_PACKAGE,
            f"{path}.py": SGLANG + (functions or SGLANG_PLANTED) + SGLANG_CALL + extra,
        }
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
