"""The compiled module's MoE in plain torch: reads its arguments by their C++ names, undoes the layouts, multiplies.

It stands for what FlashInfer's sources say of the kernels, not for the chip; see `trtllm_compiled`.
"""

from __future__ import annotations

from typing import Any

import torch
from flashinfer.fused_moe.core import get_reorder_rows_for_gated_act_gemm_row_indices
from flashinfer.tllm_enums import RoutingInputMode, RoutingMethodType
from flashinfer.utils import get_shuffle_matrix_a_row_indices
from trtllm_compiled import E2M1, deinterleave

from moetune.spec.layer import RoutingMethod
from moetune.workload.packing import unpack_topk
from moetune.workload.router import route

Arguments = dict[str, Any]


def given(arguments: Arguments, *names: str) -> Any:
    """The argument that goes by one of `names` in the C++ source."""
    return next(arguments[name] for name in names if name in arguments)


def chosen(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights by the kernel's routing, as csrc/…/trtllm_fused_moe_routing_runner.cu describes it."""
    logits = arguments.get("routing_logits")
    if logits is not None:
        return _route(arguments, logits.float())
    ids, weights = given(arguments, "expert_indices", "topk_ids"), given(arguments, "expert_weights", "topk_weights")
    if arguments.get("routing_input_mode", RoutingInputMode.PackedPrecomputed) == RoutingInputMode.PackedPrecomputed:
        ids, weights = unpack_topk(ids)
    return ids, weights.float()


def _route(arguments: Arguments, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    method = RoutingMethodType(arguments["routing_method_type"])
    groups = arguments["n_group"] or 1, arguments["topk_group"] or 1
    scaling = 1.0 if arguments["routed_scaling_factor"] is None else arguments["routed_scaling_factor"]
    biased = method in (RoutingMethodType.DeepSeekV3, RoutingMethodType.MiniMax2)
    assert groups == (1, 1) or method is RoutingMethodType.DeepSeekV3
    assert biased == (arguments["routing_bias"] is not None)
    kernel = RoutingMethod(
        scoring="softmax" if method in (RoutingMethodType.Default, RoutingMethodType.Renormalize) else "sigmoid",
        num_groups=groups[0],
        top_k_groups=groups[1],
        renormalize=method.name in ("Renormalize", "DeepSeekV3", "MiniMax2", "SigmoidRenorm"),
        scaling=scaling if biased else 1.0,
    )
    return route(kernel, logits, arguments["top_k"], arguments["routing_bias"])


def output(function: str, arguments: Arguments) -> torch.Tensor:
    """f32 `[M, H]`, padded as the kernel pads it; the intermediate stays f32."""
    ids, weights = chosen(arguments)
    x = activations(function, arguments)
    on_input = bool(arguments.get("use_routing_scales_on_input"))
    out = torch.zeros(len(x), arguments["output"].shape[1])
    for expert in range(arguments["local_num_experts"]):
        rows, columns = torch.where(ids == arguments["local_expert_offset"] + expert)
        weight = weights[rows, columns].unsqueeze(1)
        products = _expert(function, arguments, expert, x[rows] * weight if on_input else x[rows])
        out.index_add_(0, rows, products if on_input else products * weight)
    return out


def activations(function: str, arguments: Arguments) -> torch.Tensor:
    """What the first GEMM reads, f32 `[M, H]`."""
    x, scale = arguments["hidden_states"], arguments.get("hidden_states_scale")
    if scale is None:
        return x.float()
    if function == "trtllm_fp8_block_scale_moe":
        return (x.float().unflatten(1, (-1, 128)) * scale.t().unsqueeze(2)).flatten(1)
    if x.dtype == torch.uint8:
        return _fp4(x, scale.float())
    return (x.float().unflatten(1, (-1, 32)) * _e8m0(scale).unsqueeze(2)).flatten(1)


def _expert(function: str, arguments: Arguments, expert: int, x: torch.Tensor) -> torch.Tensor:
    def of(*names: str) -> Any:
        value = next((arguments[name] for name in names if name in arguments), None)
        return None if value is None else value[expert]

    def scalar(*names: str) -> torch.Tensor:
        value = of(*names)
        return torch.tensor(1.0) if value is None else value

    w1, w2 = (_weight(function, arguments, expert, gemm) for gemm in (1, 2))
    projected = x @ w1.T
    if of("gemm1_bias") is not None:
        projected = projected + _ordered(of("gemm1_bias").unsqueeze(1), 128, gated=True).squeeze(1)
    up, gate = projected.chunk(2, dim=1)
    dequantize = scalar("output1_scales_gate_scalar")
    up, gate = up * dequantize, gate * dequantize
    if of("gemm1_clamp_limit") is not None:
        gate, up = gate.clamp(max=of("gemm1_clamp_limit")), up.clamp(-of("gemm1_clamp_limit"), of("gemm1_clamp_limit"))
    alpha = of("gemm1_alpha")
    beta = of("gemm1_beta")
    activated = gate * ((1.0 if alpha is None else alpha) * gate).sigmoid() * (up + (0.0 if beta is None else beta))
    activated = activated * scalar("output1_scales_scalar") / dequantize
    products = activated @ w2.T * scalar("output2_scales_scalar")
    return products if of("gemm2_bias") is None else products + _ordered(of("gemm2_bias").unsqueeze(1), 128).squeeze(1)


def _weight(function: str, arguments: Arguments, expert: int, gemm: int) -> torch.Tensor:
    """One expert's f32 `[N, K]` of one GEMM, its rows in the checkpoint's order."""
    stored = arguments[f"gemm{gemm}_weights"][expert]
    scale = arguments.get(f"gemm{gemm}_weights_scale")
    gated = gemm == 1
    if stored.dim() == 3:  # BlockMajorK: [K/block, N, block]
        stored = stored.transpose(0, 1).flatten(1)
    if function == "trtllm_fp8_block_scale_moe":
        assert (arguments["use_shuffled_weight"], arguments["weight_layout"]) in ((True, 2), (False, 0))
        if arguments["use_shuffled_weight"]:
            stored = _ordered(stored.view(torch.uint8), 64).view(torch.float8_e4m3fn)
        weight = stored.float()
        return weight * scale[expert].repeat_interleave(128, 0).repeat_interleave(128, 1)
    weight = _ordered(stored.view(torch.uint8), 128, gated=gated).view(stored.dtype)
    if scale is None:
        return weight.float()
    columns = scale[expert].numel() // len(weight)
    linear = _ordered(deinterleave(scale[expert].flatten(), len(weight), columns), 128, gated=gated)
    if function == "trtllm_mxint4_block_scale_moe":
        codes = torch.stack((weight & 15, weight >> 4), dim=2).flatten(1).to(torch.int8)
        values = torch.where(codes > 7, codes - 16, codes).float()
        return (values.unflatten(1, (columns, -1)) * linear.float().unsqueeze(2)).flatten(1)
    return _fp4(weight, linear.float() if 2 * weight.shape[1] // columns == 16 else _e8m0(linear))


def _ordered(rows: torch.Tensor, epilogue_rows: int, *, gated: bool = False) -> torch.Tensor:
    """Undoes the shuffle of an epilogue tile's rows and, of gate and up, their turns."""
    original = torch.empty_like(rows)
    order = get_shuffle_matrix_a_row_indices(rows, epilogue_rows)
    if gated:
        order = get_reorder_rows_for_gated_act_gemm_row_indices(rows)[order]
    original[order] = rows
    return original


def _fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1).long()
    values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1)


def _e8m0(scale: torch.Tensor) -> torch.Tensor:
    return (scale.view(torch.uint8).float() - 127).exp2()
