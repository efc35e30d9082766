"""Makes the arguments of FlashInfer's public ops, by name."""

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
"""Engines pass this method with given ids, which need none (vLLM: trtllm_fp8_moe.py, `routing_method_type=1`)."""


def routed(layer: MoELayer, ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Returns the routing arguments for given ids: packed int32 `[M, k]`, or int32 ids and f32 or bf16 weights."""
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
    """Returns the routing arguments for f32 or bf16 logits `[M, E]` and an f32 bias `[E]`."""
    from flashinfer.tllm_enums import RoutingMethodType

    method = routing.method
    has_groups = (
        routing.name == "DeepSeekV3"
    )  # the launcher refuses this method without groups, and any other with groups
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
    """Returns all arguments of the layer's op.

    `enable_pdl` is True, which is what None means on every device that these kernels run on. None would need a device.

    Args:
        layer: the whole layer.
        shard: the rank's experts.
        sizes: the sizes of the rank's experts.
        top_k: the number of ids in a row.
        tune_max_num_tokens: the largest row count that FlashInfer's tuner tunes.
        weights: `Weights.arguments` or `meta_weights`.
        activations: the hidden states and their scales or None; see `Weights.quantize`.
        output: bf16 `[M, H]` with the padded H.
        routing: the arguments of `routed` or `from_logits`.
        fp8_block_layout: the layout of DeepSeek's e4m3 experts.
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
    """Returns weights without storage. The ops' Python code reads only the number of fp4 values a scale."""
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
