"""Makes logits from which the kernel's own routing picks given ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moetune.errors import UnsupportedError
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Shard
from moetune.workload.distribution import seeded_generator
from moetune.workload.router import route

CHOSEN = (1.0, 3.0)
OTHERS = (-10.0, -8.0)
"""The ranges of the logits of chosen and of other experts. Their sigmoids are 0.73 … 0.95 and below 4e-4.

With a bias within ±0.1, in bf16 too, every chosen expert scores higher than every other one. A group with one chosen
expert scores higher than every group with none.
"""
LARGEST_BIAS = 0.1


@dataclass(frozen=True, slots=True)
class KernelRouting:
    """Describes one of the kernel's routing methods. `name` is that in `flashinfer.tllm_enums.RoutingMethodType`.

    `method`: what the kernel computes. Its scaling is 1 if the kernel applies none (csrc/fused_moe/trtllm_backend/
    trtllm_fused_moe_routing_runner.cu). `float_logits`: whether engines pass logits in float32; else in bf16.
    """

    name: str
    method: RoutingMethod
    float_logits: bool = False

    def within_groups(self, num_experts: int, ids: torch.Tensor) -> KernelRouting:
        """Returns this routing, or one without groups if a row of `ids` is in more groups than the limit allows.

        A layer's own router never exceeds its limit, but balanced ids can, and so can the ids of a shard that divides a
        group. With a single group the same kernel still has exactly the given load.
        """
        if not self.method.grouped:
            return self
        group = ids.long() // (num_experts // self.method.num_groups)
        touched = torch.zeros(len(ids), self.method.num_groups, dtype=torch.bool).scatter_(1, group, True)
        if int(touched.sum(1).max()) <= self.method.top_k_groups:
            return self
        ungrouped = self.method.model_copy(update={"num_groups": 1, "top_k_groups": 1})
        return KernelRouting(self.name, ungrouped, self.float_logits)


def kernel_routing(layer: MoELayer) -> KernelRouting:
    """Returns the kernel's method for the layer's router.

    Raises:
        UnsupportedError: the kernel has no such method.
    """
    method = layer.routing
    unscaled = method.model_copy(update={"scaling": 1.0})
    if method.scoring == "softmax":
        if method.bias or method.grouped:
            what = "a softmax with a bias" if method.bias else "a softmax with groups"
            raise UnsupportedError(f"has no routing from logits by {what}")
        return KernelRouting("Renormalize" if method.renormalize else "Default", unscaled)
    if method.bias or method.grouped:
        if not method.renormalize or method.group_score != "top2":
            raise UnsupportedError(
                "routes from logits by sigmoids with a bias or groups only if the weights are renormalized and "
                "a group's score is the sum of its two best experts' scores"
            )
        if method.top_k_groups > 4:
            raise UnsupportedError(f"routes from logits within 4 groups at most, not {method.top_k_groups}")
        plain = not method.grouped and method.scaling == 1.0
        return KernelRouting("MiniMax2" if plain else "DeepSeekV3", method, float_logits=True)
    if layer.top_k == 1 and not method.renormalize:
        return KernelRouting("Llama4", unscaled)
    return KernelRouting("SigmoidRenorm" if method.renormalize else "Sigmoid", unscaled)


def complete_rows(ids: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Returns `ids` `[M, k]` with each −1 replaced by a non-local expert that is not yet in the row.

    A router always chooses k experts from logits. The kernel skips non-local experts as it skips −1. A row of −1 only
    gets consecutive non-local experts, because these are in few groups.

    Raises:
        UnsupportedError: a row needs more non-local experts than there are.
    """
    empty = ids < 0
    if not bool(empty.any()):
        return ids
    is_non_local = torch.ones(shard.num_physical, dtype=torch.bool)
    is_non_local[shard.first : shard.first + shard.num_local] = False
    non_local = torch.arange(shard.num_physical)[is_non_local]
    rows = empty.any(1)
    free = (ids[rows].unsqueeze(2) != non_local).all(1)
    if int((free.sum(1) - empty[rows].sum(1)).min()) < 0:
        raise UnsupportedError(
            f"The kernel's router fills every row with {ids.shape[1]} experts, but the other ranks have only "
            f"{len(non_local)}.",
            "Use the backend flashinfer-trtllm-routed.",
        )
    # the text is part of the seed, so another word for non-local would change the ids
    generator = seeded_generator("foreign experts", tuple(ids.shape), shard.first)
    keys = torch.rand(free.shape, generator=generator)
    whole = empty[rows].all(1)
    begin = torch.randint(len(non_local), (int(whole.sum()), 1), generator=generator)
    keys[whole] = -((torch.arange(len(non_local)) - begin) % len(non_local)).float()
    keys.masked_fill_(~free, -math.inf)
    width = min(ids.shape[1], len(non_local))
    candidates = non_local[keys.topk(width, dim=1).indices]
    position = (empty[rows].cumsum(1) - 1).clamp(min=0)
    completed = ids.clone()
    completed[rows] = torch.where(
        empty[rows], candidates.gather(1, position.clamp(max=width - 1)).to(ids.dtype), ids[rows]
    )
    return completed


def random_logits(ids: torch.Tensor, num_experts: int, routing: KernelRouting, seed: int) -> torch.Tensor:
    """Returns random logits `[M, num_experts]` from which `routing` picks the experts `ids` `[M, k]` in every row.

    Because they are random, the router's weights differ between slots, and a wrong weight changes the output.
    `engine.flashinfer_ops.logits_for` has another purpose: the same load under an engine's routing bias of any size.

    Args:
        ids: experts `[M, k]`. None is negative or twice in a row, and each row keeps the group limit; see
            `complete_rows` and `KernelRouting.within_groups`.
        num_experts: the number of columns.
        routing: the kernel's method. It says whether the logits are float32 or bf16.
        seed: the seed.
    """
    generator = seeded_generator("logits", tuple(ids.shape), num_experts, seed)
    logits = torch.empty(len(ids), num_experts).uniform_(*OTHERS, generator=generator)
    chosen = torch.empty(ids.shape).uniform_(*CHOSEN, generator=generator)
    logits.scatter_(1, ids.long(), chosen)
    return logits if routing.float_logits else logits.bfloat16()


def correction_bias(num_experts: int, routing: KernelRouting, seed: int) -> torch.Tensor | None:
    """Returns a random bias `[num_experts]` float32 within ±`LARGEST_BIAS` if `routing` takes one, else None."""
    if not routing.float_logits:
        return None
    generator = seeded_generator("correction bias", num_experts, seed)
    return torch.empty(num_experts).uniform_(-LARGEST_BIAS, LARGEST_BIAS, generator=generator)


def kernel_choice(
    logits: torch.Tensor, routing: KernelRouting, top_k: int, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the experts (int64) and weights (float32), `[M, top_k]`, that the kernel's method chooses."""
    return route(routing.method, logits.float(), top_k, bias)
