"""Runs the layer's own router on random logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime, Shard
from moetune.workload.distribution import random_logits
from moetune.workload.ranks import alike

Choice = tuple[torch.Tensor, torch.Tensor | None]
"""Ids int64 `[rows, k]`, and the router's weights for them float32, or None if no router chose them."""

_CHUNK_LOGITS = 1 << 20
_SCORES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def route(
    method: RoutingMethod, logits: torch.Tensor, top_k: int, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the experts and weights that `method` chooses for each row of `logits` `[rows, num_experts]`.

    The result is `(experts int64, weights float32)`, both `[rows, top_k]`, the best expert first. `bias`
    `[num_experts]` is added to the scores for the selection only. The group limit with `group_score="max"` is that of
    DeepSeek-V2 (arXiv 2405.04434, 2.2.2), and with `"top2"` that of DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
    """
    scores = _SCORES[method.scoring](logits)
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


def random_top_k(
    generator: torch.Generator, layer: MoELayer, first: int, count: int, rows: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the layer's routing on random logits among the physical experts `first … first + count − 1`.

    The result is `(ids of physical experts int64, weights float32)`, both `[rows, top_k]`. Physical expert s is a copy
    of expert s mod E; of several copies, one is chosen at random. The group limit applies only if the experts are whole
    groups. The bias is zero: a model's trained bias evens out its load, and random logits have an even load without it.
    """
    num_experts = min(layer.num_experts, count)
    method = method_within(layer, first, num_experts)
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


def arriving_top_k(generator: torch.Generator, layer: MoELayer, shard: Shard, rows: int) -> Choice:
    """Returns the routing of the first `rows` tokens that have a slot in `shard`, in the form of `random_top_k`."""
    return arriving(_global_chunks(generator, layer, shard, rows), shard, rows)


def arriving(chunks: Iterator[Choice], shard: Shard, rows: int) -> Choice:
    """Returns the first `rows` tokens of `chunks` that have a slot in `shard`."""
    found = 0
    parts: list[Choice] = []
    for slots, weights in chunks:
        arrived = is_local(slots, shard).any(1)
        parts.append((slots[arrived], None if weights is None else weights[arrived]))
        found += len(parts[-1][0])
        if found >= rows:
            break
    ids, given = zip(*parts, strict=True)
    return torch.cat(ids)[:rows], None if given[0] is None else torch.cat(given)[:rows]


def front_of_blocks(ids: torch.Tensor, weights: torch.Tensor | None, shard: Shard, blocks: int) -> Choice:
    """Returns the rows of a pool: in each block those with a local id, in their order, then rows of −1.

    Args:
        ids, weights: the tokens of all blocks, `[M, k]`; changed in place.
        shard: the local experts.
        blocks: the number of equal blocks, which divides M.
    """
    absent = ~is_local(ids, shard).any(1)
    ids[absent] = -1
    front = absent.view(blocks, -1).int().argsort(dim=1, stable=True)
    block = torch.arange(0, len(ids), len(ids) // blocks).unsqueeze(1)
    order = (front + block).flatten()
    if weights is None:
        return ids[order], None
    weights[absent] = 0.0
    return ids[order], weights[order]


def _global_chunks(generator: torch.Generator, layer: MoELayer, shard: Shard, rows: int) -> Iterator[Choice]:
    size = min(max(64, 2 * rows), max(1, _CHUNK_LOGITS // layer.num_experts))
    while True:
        yield random_top_k(generator, layer, 0, shard.num_physical, size, layer.top_k)


def is_local(slots: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Returns which ids in `slots` lie in `shard`: bool, of the same shape."""
    return (slots >= shard.first) & (slots < shard.first + shard.num_local)


def representative_shard(layer: MoELayer, regime: Regime, rank: int | None = None) -> Shard:
    """Returns the shard for which `rank`'s load is computed: rank 0's if all ranks are alike, otherwise its own.

    With redundant experts it is always its own: ids that are shifted by a whole shard are copies of other experts.

    Raises:
        UsageError: the regime does not fit the layer, or there is no such rank.
    """
    shard = regime.shard(layer, rank)
    if shard.num_physical > layer.num_experts or not alike(layer, regime):
        return shard
    return regime.shard(layer, 0)


def has_closed_form(layer: MoELayer, shard: Shard) -> bool:
    """Returns whether the router chooses a uniform k-subset: no group limit and no redundant experts."""
    return not layer.routing.grouped and shard.num_physical == layer.num_experts


def method_within(layer: MoELayer, first: int, num_experts: int) -> RoutingMethod:
    """Returns the routing method among some experts: without the group limit if they are not whole groups."""
    method = layer.routing
    group_size = layer.num_experts // method.num_groups
    if not method.grouped:
        return method
    if first % group_size or num_experts % group_size:
        return method.model_copy(update={"num_groups": 1, "top_k_groups": 1})
    groups = num_experts // group_size
    return method.model_copy(update={"num_groups": groups, "top_k_groups": min(method.top_k_groups, groups)})
