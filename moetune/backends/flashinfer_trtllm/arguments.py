"""Makes the arguments of FlashInfer's public ops, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.flashinfer_trtllm.logits import KernelRouting
from moetune.backends.flashinfer_trtllm.weight_format import Format
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard

ROUTED_METHOD = "Renormalize"
"""Engines pass this method with given ids, which need none (vLLM: trtllm_fp8_moe.py, `routing_method_type=1`)."""


def routed(ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Returns the routing arguments for given ids: packed int32 `[M, k]`, or int32 ids and f32 or bf16 weights."""
    from flashinfer.tllm_enums import RoutingMethodType

    return {
        "topk_ids": ids,
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        "routing_method_type": RoutingMethodType[ROUTED_METHOD].value,
    }


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
    fmt: Format,
    layer: MoELayer,
    regime: Regime,
    shard: Shard,
    *,
    weights: Mapping[str, torch.Tensor],
    activations: tuple[torch.Tensor, torch.Tensor | None],
    output: torch.Tensor,
    routing: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns all arguments of the layer's op.

    `enable_pdl` is True, which is what None means on every device that these kernels run on. None would need a device.

    Args:
        fmt: the format of the weights.
        layer: the whole layer.
        regime: the deployment.
        shard: the rank's experts.
        weights: `Weights.arguments` or `Format.meta_weights`.
        activations: the hidden states and their scales or None; see `Format.quantize`.
        output: bf16 `[M, H]` with the padded H.
        routing: the arguments of `routed` or `from_logits`.
    """
    hidden_states, scale = activations
    return {
        "hidden_states": hidden_states,
        "num_experts": shard.num_physical,
        "top_k": regime.row_top_k(layer),
        "intermediate_size": fmt.aligned(regime.intermediate_size(layer)),
        "local_expert_offset": shard.first,
        "local_num_experts": shard.num_local,
        "do_finalize": True,
        "enable_pdl": True,
        "tune_max_num_tokens": regime.tune_max_num_tokens,
        "output": output,
        **fmt.arguments(layer, scale),
        **routing,
        **weights,
    }
