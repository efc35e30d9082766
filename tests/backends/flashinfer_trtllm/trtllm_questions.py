"""Small layers of every format, and the problems that the tests prepare."""

from __future__ import annotations

from typing import Any

from moetune.backends.base import Problem
from moetune.backends.flashinfer_trtllm.backend import TrtllmBackend, TrtllmRoutedBackend
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

SIZES: dict[Precision, tuple[int, int]] = {
    Precision.BF16: (128, 128),
    Precision.FP8_BLOCK: (256, 128),
    Precision.FP8_TENSOR: (128, 256),
    Precision.NVFP4: (512, 128),
    Precision.MXFP4: (160, 96),
    Precision.MXINT4: (256, 256),
}
"""H and I; mxfp4's are padded to 256 both."""

DEEPSEEK = RoutingMethod(scoring="sigmoid", bias=True, num_groups=4, top_k_groups=2, scaling=2.5)
ROUTERS: dict[str, RoutingMethod] = {
    "Renormalize": RoutingMethod(),
    "Default": RoutingMethod(renormalize=False),
    "DeepSeekV3": DEEPSEEK,
    "MiniMax2": RoutingMethod(scoring="sigmoid", bias=True),
    "SigmoidRenorm": RoutingMethod(scoring="sigmoid"),
    "Sigmoid": RoutingMethod(scoring="sigmoid", renormalize=False),
}
REGIMES: dict[str, dict[str, Any]] = {
    "none": {"ep_size": 4},
    "allgather": {"ep_size": 4, "dispatch": "allgather"},
    "packed": {"ep_size": 4, "dispatch": "alltoall"},
    "deduplicated": {"ep_size": 4, "layout": "deduplicated"},
    "pool": {"ep_size": 4, "layout": "pool"},
    "slot": {"ep_size": 4, "layout": "slot"},
    "packed, L < k": {"ep_size": 8, "dispatch": "alltoall"},
}


def layer(precision: Precision = Precision.BF16, **changes: Any) -> MoELayer:
    hidden, intermediate = SIZES.get(precision, (128, 128))
    gpt_oss = {"activation": Activation.SWIGLU_CLAMPED, "expert_bias": True} if precision is Precision.MXFP4 else {}
    given = {"num_experts": 16, "top_k": 3, "hidden_size": hidden, "intermediate_size": intermediate}
    return MoELayer(**{**given, "precision": precision, **gpt_oss, **changes})


def problem(asked: MoELayer, regime: Regime, rows: int = 16, rank: int = 1, draws: int = 1) -> Problem:
    routings = tuple(realize(asked, regime, rows, rank, draw) for draw in range(draws))
    return Problem(asked, regime, rows, regime.shard(asked, rank), as_draws(routings))


def backend(how: str, **options: Any) -> TrtllmBackend:
    """`how`: logits, packed or unpacked."""
    if how == "logits":
        return TrtllmBackend(**options)
    return TrtllmRoutedBackend(packed=how == "packed", **options)
