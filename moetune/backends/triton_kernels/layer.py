"""The two calls of `matmul_ogs` by which vLLM computes a layer, each under the constraints of its flags."""

from __future__ import annotations

from typing import Any

import torch

from moetune.backends.triton_kernels import package
from moetune.backends.triton_kernels.space import Flags
from moetune.backends.triton_kernels.weights import KernelExperts
from moetune.spec.layer import SWIGLU_ALPHA, SWIGLU_LIMIT

Routed = tuple[Any, Any, Any]
"""triton_kernels' RoutingData, GatherIndx and ScatterIndx."""


def first_gemm(experts: KernelExperts, x: torch.Tensor, routed: Routed, flags: Flags, out: torch.Tensor) -> None:
    """Gathers the rows of x, bf16 `[M, H]`, and writes the activation of each slot, by expert.

    Args:
        experts: the weights.
        x: the inputs.
        routed: the slots by expert.
        flags: the flags to run with.
        out: bf16 `[1, M·k, I]`. What belongs to no local slot is not written.
    """
    ogs, (weights, precision), (routing, gather, _) = package.module("matmul_ogs"), experts.swizzled1, routed
    swiglu = ogs.FnSpecs("swiglu", package.module("swiglu").swiglu_fn, ("alpha", "limit"))
    with package.constrained(package.module(package.OPT_FLAGS), flags.constraints):
        ogs.matmul_ogs(
            x,
            weights,
            experts.bias1,
            routing,
            gather_indx=gather,
            precision_config=precision,
            fused_activation=ogs.FusedActivation(swiglu, (SWIGLU_ALPHA, SWIGLU_LIMIT), 2),
            y=out,
        )


def second_gemm(experts: KernelExperts, x: torch.Tensor, routed: Routed, flags: Flags, out: torch.Tensor) -> None:
    """Multiplies what `first_gemm` wrote, with the router's weights, and writes the sum of each row's slots.

    Args:
        experts: the weights.
        x: bf16 `[M·k, I]`.
        routed: the slots by expert.
        flags: the flags to run with.
        out: bf16 `[1, M, H]`.
    """
    ogs, (weights, precision), (routing, _, scatter) = package.module("matmul_ogs"), experts.swizzled2, routed
    with package.constrained(package.module(package.OPT_FLAGS), flags.constraints):
        ogs.matmul_ogs(
            x,
            weights,
            experts.bias2,
            routing,
            scatter_indx=scatter,
            precision_config=precision,
            gammas=routing.gate_scal,
            y=out,
        )
