"""The arguments of FlashInfer's public ops, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.flashinfer_trtllm.formats import FORMATS, ExpertSizes, Fp8BlockLayout
from moetune.backends.flashinfer_trtllm.logits import KernelRouting
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Shard

ROUTED_METHOD = "Renormalize"
"""Given ids need no method; engines pass this one (vLLM: trtllm_fp8_moe.py, `routing_method_type=1`)."""


def routed(layer: MoELayer, ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """How the op for given ids is routed: int32 `[M, k]` packed, or int32 ids and f32 or bf16 weights."""
    from flashinfer.tllm_enums import RoutingMethodType

    arguments: dict[str, Any] = {
        "topk_ids": ids,
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        "routing_method_type": RoutingMethodType[ROUTED_METHOD].value,
    }
    if layer.precision not in (Precision.BF16, Precision.MXINT4):
        arguments["routing_bias"] = None
    return arguments


def from_logits(routing: KernelRouting, logits: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Any]:
    """How the op that routes is routed: f32 or bf16 logits `[M, E]`, f32 bias `[E]`."""
    from flashinfer.tllm_enums import RoutingMethodType

    method = routing.method
    has_groups = routing.name == "DeepSeekV3"  # the launcher refuses it without, and any other method with
    return {
        "routing_logits": logits,
        "routing_bias": bias,
        "n_group": method.num_groups if has_groups else None,
        "topk_group": method.top_k_groups if has_groups else None,
        "routed_scaling_factor": method.scaling if bias is not None else None,
        "routing_method_type": RoutingMethodType[routing.name].value,
        "norm_topk_prob": method.renormalize,
    }


def op_arguments(
    layer: MoELayer,
    shard: Shard,
    sizes: ExpertSizes,
    *,
    top_k: int,
    tune_max_num_tokens: int,
    weights: Mapping[str, torch.Tensor],
    activations: tuple[torch.Tensor, torch.Tensor | None],
    output: torch.Tensor,
    routing: Mapping[str, Any],
    fp8_block_layout: Fp8BlockLayout = "blocked",
) -> dict[str, Any]:
    """Every argument of the layer's op. `routing` is `routed`'s or `from_logits`', `weights` are `Weights.arguments`.

    `enable_pdl` is what None means on every chip that these kernels run on, and needs no device to ask.
    """
    from flashinfer.tllm_enums import ActivationType, Fp8QuantizationType, SfLayout, WeightLayout

    hidden_states, scale = activations
    arguments: dict[str, Any] = {
        "hidden_states": hidden_states,
        "num_experts": shard.num_physical,
        "top_k": top_k,
        "intermediate_size": sizes.padded_intermediate,
        "local_expert_offset": shard.first,
        "local_num_experts": shard.num_local,
        "do_finalize": True,
        "enable_pdl": True,
        "tune_max_num_tokens": tune_max_num_tokens,
        "output": output,
        **routing,
        **weights,
    }
    optional: tuple[str, ...] = ()
    match layer.precision:
        case Precision.BF16:
            arguments |= {"use_shuffled_weight": True, "weight_layout": WeightLayout.BlockMajorK.value}
        case Precision.FP8_BLOCK:
            blocked = fp8_block_layout == "blocked"
            arguments |= {
                "hidden_states_scale": scale,
                "use_shuffled_weight": blocked,
                "weight_layout": (WeightLayout.BlockMajorK if blocked else WeightLayout.MajorK).value,
                "fp8_quantization_type": Fp8QuantizationType.DeepSeekFp8,
            }
        case Precision.FP8_TENSOR:
            arguments["use_routing_scales_on_input"] = layer.weight_on_input
        case Precision.NVFP4 | Precision.MXFP4:
            arguments |= {"hidden_states_scale": scale, "hidden_states_scale_layout": SfLayout.layout_linear}
            optional = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm1_bias", "gemm2_bias")
        case Precision.MXINT4:
            optional = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    if layer.precision is not Precision.MXINT4:
        arguments["activation_type"] = ActivationType.Swiglu.value
    return {**dict.fromkeys(optional), **arguments}


def meta_weights(layer: MoELayer, sizes: ExpertSizes) -> dict[str, torch.Tensor]:
    """Weights without storage, enough for the ops' Python: it reads no more than fp4's values a scale."""
    fp4 = {Precision.NVFP4: 16, Precision.MXFP4: 32}.get(layer.precision)
    names = {
        Precision.BF16: (),
        Precision.FP8_TENSOR: ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar"),
        Precision.NVFP4: ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"),
        Precision.MXFP4: ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"),
    }.get(layer.precision, ())
    width = FORMATS[layer.precision].multiple_of
    meta: dict[str, torch.Tensor] = {
        name: torch.empty(1, 1, width // 2 if fp4 else width, dtype=torch.uint8, device="meta")
        for name in ("gemm1_weights", "gemm2_weights")
    }
    if layer.precision not in (Precision.BF16, Precision.FP8_TENSOR):
        for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
            meta[name] = torch.empty(1, 1, width // (fp4 or 32), dtype=torch.float8_e4m3fn, device="meta")
    return meta | {name: torch.empty(sizes.num_local, device="meta") for name in names}
