"""Logits from which the kernel's own routing picks given ids."""

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
"""Logits of chosen and other experts. Sigmoids: 0.73 … 0.95 and below 4e-4, so with a bias within ±0.1 every chosen
expert is ahead of every other, and a group with one chosen expert ahead of every group without; in bf16 too."""
LARGEST_BIAS = 0.1


@dataclass(frozen=True, slots=True)
class KernelRouting:
    """One of the kernel's routing methods, by its name in `flashinfer.tllm_enums.RoutingMethodType`.

    `method`: what it computes; the scaling is 1 where the kernel applies none (csrc/fused_moe/trtllm_backend/
    trtllm_fused_moe_routing_runner.cu). `float_logits`: float32, else bf16, as the engines pass them.
    """

    name: str
    method: RoutingMethod
    float_logits: bool = False

    def within_groups(self, num_experts: int, ids: torch.Tensor) -> KernelRouting:
        """This routing, without groups if a row of `ids` lies in more groups than the limit allows.

        A layer's own router never exceeds its limit; balanced ids and those of a shard that cuts groups can. Then
        the same kernel is given one group, under which the load is still exact.
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
    """The kernel's method for the layer's router.

    Raises:
        UnsupportedError: the kernel has none.
    """
    method = layer.routing
    unscaled = method.model_copy(update={"scaling": 1.0})
    if method.scoring == "softmax":
        if method.bias or method.grouped:
            what = "a softmax with a bias" if method.bias else "a softmax with groups"
            raise UnsupportedError(f"routes from logits by no method that is {what}")
        return KernelRouting("Renormalize" if method.renormalize else "Default", unscaled)
    if method.bias or method.grouped:
        if not method.renormalize or method.group_score != "top2":
            raise UnsupportedError(
                "routes from logits by sigmoids with a bias or groups only when weights are renormalized and "
                "a group is as good as its two best experts"
            )
        if method.top_k_groups > 4:
            raise UnsupportedError(f"routes from logits within 4 groups at most, not {method.top_k_groups}")
        plain = not method.grouped and method.scaling == 1.0
        return KernelRouting("MiniMax2" if plain else "DeepSeekV3", method, float_logits=True)
    if layer.top_k == 1 and not method.renormalize:
        return KernelRouting("Llama4", unscaled)
    return KernelRouting("SigmoidRenorm" if method.renormalize else "Sigmoid", unscaled)


def complete_rows(ids: torch.Tensor, shard: Shard) -> torch.Tensor:
    """`ids` `[M, k]` with each −1 replaced by an expert of another rank that is not yet in the row.

    A router that works on logits always chooses k experts; the kernel skips those of other ranks as it skips −1. A row
    of nothing gets neighbors, which lie in few groups.

    Raises:
        UnsupportedError: the other ranks have too few experts for a row.
    """
    empty = ids < 0
    if not bool(empty.any()):
        return ids
    is_foreign = torch.ones(shard.num_physical, dtype=torch.bool)
    is_foreign[shard.first : shard.first + shard.num_local] = False
    foreign = torch.arange(shard.num_physical)[is_foreign]
    rows = empty.any(1)
    free = (ids[rows].unsqueeze(2) != foreign).all(1)
    if int((free.sum(1) - empty[rows].sum(1)).min()) < 0:
        raise UnsupportedError(
            f"routes from logits, which fill every row with {ids.shape[1]} experts; "
            f"the other ranks have only {len(foreign)}"
        )
    generator = seeded_generator("foreign experts", tuple(ids.shape), shard.first)
    keys = torch.rand(free.shape, generator=generator)
    whole = empty[rows].all(1)
    begin = torch.randint(len(foreign), (int(whole.sum()), 1), generator=generator)
    keys[whole] = -((torch.arange(len(foreign)) - begin) % len(foreign)).float()
    keys.masked_fill_(~free, -math.inf)
    width = min(ids.shape[1], len(foreign))
    candidates = foreign[keys.topk(width, dim=1).indices]
    position = (empty[rows].cumsum(1) - 1).clamp(min=0)
    completed = ids.clone()
    completed[rows] = torch.where(
        empty[rows], candidates.gather(1, position.clamp(max=width - 1)).to(ids.dtype), ids[rows]
    )
    return completed


def random_logits(ids: torch.Tensor, num_experts: int, routing: KernelRouting, seed: int) -> torch.Tensor:
    """Returns random logits `[M, num_experts]` from which `routing` picks the experts `ids` `[M, k]` in every row.

    Random, so that the router's weights differ between slots and a wrong weight shows in the output. The function
    `engine.flashinfer_ops.logits_for` serves another need: the same load under an engine's routing bias of any size.

    float32 or bf16, as `routing` says. No id may be negative, none twice in a row, and a group limit must hold: see
    `complete_rows` and `KernelRouting.within_groups`.
    """
    generator = seeded_generator("logits", tuple(ids.shape), num_experts, seed)
    logits = torch.empty(len(ids), num_experts).uniform_(*OTHERS, generator=generator)
    chosen = torch.empty(ids.shape).uniform_(*CHOSEN, generator=generator)
    logits.scatter_(1, ids.long(), chosen)
    return logits if routing.float_logits else logits.bfloat16()


def correction_bias(num_experts: int, routing: KernelRouting, seed: int) -> torch.Tensor | None:
    """A random bias `[num_experts]` float32 within `LARGEST_BIAS` where `routing` takes one, else None."""
    if not routing.float_logits:
        return None
    generator = seeded_generator("correction bias", num_experts, seed)
    return torch.empty(num_experts).uniform_(-LARGEST_BIAS, LARGEST_BIAS, generator=generator)


def kernel_choice(
    logits: torch.Tensor, routing: KernelRouting, top_k: int, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts (int64) and weights (float32), `[M, top_k]`, that the kernel's method gives."""
    return route(routing.method, logits.float(), top_k, bias)
