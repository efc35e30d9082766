"""The layer's own router on dummy logits, and how many of a token's slots it sends to one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime, Shard
from moetune.workload.popularity import random_logits, seeded_generator

LAW_TOKENS = 16384
_CHUNK_LOGITS = 1 << 20


@dataclass(frozen=True, slots=True)
class LocalSlotLaw:
    """`probabilities[c]`: the chance that c of a token's k slots are one rank's; `simulated`, or in closed form."""

    probabilities: tuple[float, ...]
    simulated: bool

    @property
    def hit_fraction(self) -> float:
        """The chance that a token has something for the rank."""
        return 1.0 - self.probabilities[0]

    @property
    def mean(self) -> float:
        """Expected local slots of a token."""
        return sum(count * probability for count, probability in enumerate(self.probabilities))


def route(
    method: RoutingMethod, logits: torch.Tensor, top_k: int, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights that `method` gives each row of `logits` `[rows, num_experts]`.

    Returns `(experts int64, weights float32)`, both `[rows, top_k]`, the best expert first. `bias`
    `[num_experts]` is added to the scores for the selection only. Group limit: DeepSeek-V2 (arXiv 2405.04434, 2.2.2)
    with `group_score="max"`, DeepSeek-V3 (arXiv 2412.19437, 2.1.2) with `"top2"`.
    """
    scores = logits.softmax(1) if method.scoring == "softmax" else logits.sigmoid()
    ranked = scores if bias is None else scores + bias
    if method.grouped:
        ranked = _limit_to_best_groups(method, ranked)
    experts = ranked.topk(top_k, dim=1).indices
    weights = scores.gather(1, experts)
    if method.renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    return experts, (weights * method.scaling).float()


def _limit_to_best_groups(method: RoutingMethod, ranked: torch.Tensor) -> torch.Tensor:
    grouped = ranked.view(len(ranked), method.num_groups, -1)
    best = grouped.topk(min(2 if method.group_score == "top2" else 1, grouped.shape[2]), dim=2).values.sum(2)
    kept = best.topk(method.top_k_groups, dim=1).indices
    excluded = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(excluded.unsqueeze(2), -math.inf).flatten(1)


def random_slots(
    generator: torch.Generator, layer: MoELayer, first: int, count: int, rows: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's routing on random logits of the experts that slots `first … first + count − 1` hold.

    Slot s holds expert s mod E; of several replicas one is chosen at random. The group limit holds among slots
    that are whole groups; any others are chosen from without groups. A trained bias is there to even the load
    out, so the dummy's is zero.
    Returns `(slots int64, weights float32)`, both `[rows, top_k]`.
    """
    num_experts = min(layer.num_experts, count)
    method = _method_within(layer, first, num_experts)
    step = max(1, _CHUNK_LOGITS // num_experts)
    parts = [
        route(method, random_logits(generator, min(step, rows - start), num_experts), top_k)
        for start in range(0, rows, step)
    ]
    experts, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    if count > num_experts:
        replicas = (count - 1 - experts) // num_experts + 1
        choice = torch.rand(experts.shape, dtype=torch.float64, generator=generator)
        experts += (choice * replicas).long() * num_experts
    return experts + first, weights


def arriving_slots(
    generator: torch.Generator, layer: MoELayer, shard: Shard, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `rows` tokens of the global router that have a slot in `shard`; returns as `random_slots`."""
    found = 0
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for slots, weights in _global_chunks(generator, layer, shard, rows):
        arrived = is_local(slots, shard).any(1)
        parts.append((slots[arrived], weights[arrived]))
        found += len(parts[-1][0])
        if found >= rows:
            break
    slots, weights = (torch.cat(column)[:rows] for column in zip(*parts, strict=True))
    return slots, weights


def _global_chunks(
    generator: torch.Generator, layer: MoELayer, shard: Shard, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size = min(max(64, 2 * rows), max(1, _CHUNK_LOGITS // layer.num_experts))
    while True:
        yield random_slots(generator, layer, 0, shard.num_slots, size, layer.top_k)


def is_local(slots: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Which of `slots` lie in `shard`: bool, of the same shape."""
    return (slots >= shard.first) & (slots < shard.first + shard.num_local)


def representative_shard(layer: MoELayer, regime: Regime, rank: int) -> Shard:
    """The shard that stands for `rank`'s: rank 0's where shards are equal and no expert is redundant, else its own.

    Raises:
        UsageError: the regime does not fit the layer, or there is no such rank.
    """
    shard = regime.shard(layer, rank)
    alike = shard.num_slots == layer.num_experts and shard.num_slots % regime.ep_size == 0
    return regime.shard(layer, 0) if alike else shard


def has_closed_form(layer: MoELayer, shard: Shard) -> bool:
    """Whether the router chooses a uniform k-subset of the slots: no group limit and no redundant experts."""
    return not layer.routing.grouped and shard.num_slots == layer.num_experts


@lru_cache(maxsize=256)
def local_slot_law(layer: MoELayer, shard: Shard, seed: int = 0) -> LocalSlotLaw:
    """How many of a token's k slots lie in `shard` when the layer's router works on random logits.

    An ungrouped router on independent logits chooses a uniform k-subset of E experts, so the number among L
    given ones is hypergeometric: C(L, c)·C(E − L, k − c) / C(E, k). With a group limit or redundant experts
    the law is that of `LAW_TOKENS` tokens of the router seeded by `seed`, averaged over all shards of this size
    where symmetry gives them one law.
    """
    experts, top_k, local = layer.num_experts, layer.top_k, shard.num_local
    if has_closed_form(layer, shard):
        ways = [math.comb(local, c) * math.comb(experts - local, top_k - c) for c in range(top_k + 1)]
        return LocalSlotLaw(tuple(way / math.comb(experts, top_k) for way in ways), simulated=False)
    generator = seeded_generator("local slot law", experts, top_k, repr(layer.routing), shard, seed)
    slots, _ = random_slots(generator, layer, 0, shard.num_slots, LAW_TOKENS, top_k)
    if _shards_are_symmetric(layer, shard):
        num_shards = experts // local
        received = torch.zeros(LAW_TOKENS, num_shards, dtype=torch.int64)
        received.scatter_add_(1, slots // local, torch.ones_like(slots))
    else:
        received = is_local(slots, shard).sum(1)
    counts = torch.bincount(received.flatten(), minlength=top_k + 1).tolist()
    return LocalSlotLaw(tuple(count / received.numel() for count in counts), simulated=True)


def _shards_are_symmetric(layer: MoELayer, shard: Shard) -> bool:
    """Whether every shard of `shard`'s size is whole router groups, or each lies in one, and none is redundant."""
    local, group_size = shard.num_local, layer.num_experts // layer.routing.num_groups
    equal = shard.num_slots == layer.num_experts and layer.num_experts % local == 0 and shard.first % local == 0
    return equal and (local % group_size == 0 or group_size % local == 0)


def _method_within(layer: MoELayer, first: int, num_experts: int) -> RoutingMethod:
    method = layer.routing
    group_size = layer.num_experts // method.num_groups
    if not method.grouped:
        return method
    if first % group_size or num_experts % group_size:
        return method.model_copy(update={"num_groups": 1, "top_k_groups": 1})
    groups = num_experts // group_size
    return method.model_copy(update={"num_groups": groups, "top_k_groups": min(method.top_k_groups, groups)})
