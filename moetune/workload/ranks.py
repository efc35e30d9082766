"""Chooses the rank that a tune measures, and tells which ranks have equal loads. Does not import torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

from moetune.errors import UsageError
from moetune.spec.enums import RANK_WORDS, RankWord
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard


def tuned_rank(layer: MoELayer, regime: Regime, asked: RankWord | int | None = None) -> int:
    """Returns the rank that a tune measures.

    A rank's load is the expected number of its slots in a token (k·L/E without redundant experts); where ranks tie
    and rows arrive by hits (layouts deduplicated and pool), how its experts spread over the router's groups counts:
    the more evenly, the more tokens reach the rank. Of ranks that still tie it is the lowest; where all ranks are
    alike it is 0, whatever is asked.

    Args:
        layer, regime: whose ranks.
        asked: `mean`, `fullest` or a rank. None is `mean` where shards are equal and `fullest` where they are not.

    Raises:
        UsageError: another word, no such rank, or the regime does not fit the layer.
    """
    if asked not in (None, *RANK_WORDS) and type(asked) is not int:
        raise UsageError(f"rank must be {', '.join(RANK_WORDS)} or a number, given {asked!r}.")
    even = equal_shards(layer, regime)
    if isinstance(asked, int):
        regime.shard(layer, asked)
        return 0 if alike(layer, regime) else asked
    if alike(layer, regime):
        return 0
    choose = _fullest if (asked or ("mean" if even else "fullest")) == "fullest" else _nearest_to_mean
    ranks = choose(list(range(regime.ep_size)), lambda rank: _load(layer, regime, rank))
    if layer.routing.grouped and regime.layout in ("deduplicated", "pool"):
        ranks = choose(ranks, lambda rank: -_crowding(layer, regime.shard(layer, rank)))
    return ranks[0]


def of_rank(layer: MoELayer, regime: Regime, asked: RankWord | int | None = None) -> Regime:
    """Returns `regime` with the rank of `tuned_rank`: the regime under which results are stored.

    A rank that `regime` was given at its construction stays where none is asked.

    Raises:
        UsageError: as `tuned_rank`.
    """
    if asked is None and "rank" in regime.model_fields_set:
        asked = regime.rank
    rank = tuned_rank(layer, regime, asked)
    return regime if asked is None and rank == regime.rank else regime.model_copy(update={"rank": rank})


def alike(layer: MoELayer, regime: Regime) -> bool:
    """Returns whether all ranks have the same load except for the ids of their experts.

    Ranks differ where shards are uneven; and, except in packed rows, which stay within a shard, where experts are
    redundant, or where shards cut a router's groups in different places.
    """
    if not equal_shards(layer, regime):
        return False
    num_local = regime.shard(layer, 0).num_local
    return regime.layout == "packed" or not (regime.redundant_experts or straddles(layer, num_local))


def equal_shards(layer: MoELayer, regime: Regime) -> bool:
    """Returns whether all ranks have equally many physical experts."""
    return (layer.num_experts + regime.redundant_experts) % regime.ep_size == 0


def straddles(layer: MoELayer, num_local: int) -> bool:
    """Returns whether some of the equal shards of `num_local` experts has parts of two router groups."""
    group_size = layer.num_experts // layer.routing.num_groups
    return layer.routing.grouped and num_local % group_size != 0 and group_size % num_local != 0


def num_copies(num_experts: int, shard: Shard, slot: int) -> int:
    """Returns the number of copies of the expert of physical expert `slot`: physical expert s is a copy of s mod E."""
    return (shard.num_physical - 1 - slot % num_experts) // num_experts + 1


def expert_chances(layer: MoELayer, shard: Shard) -> list[float]:
    """Returns, for each local physical expert, the chance that a token has it: k/E over the number of copies.

    By symmetry of the experts it holds for grouped routers too.
    """
    share = layer.top_k / layer.num_experts
    slots = range(shard.first, shard.first + shard.num_local)
    return [share / num_copies(layer.num_experts, shard, slot) for slot in slots]


def _weights(num_experts: int, shard: Shard) -> list[tuple[int, Fraction]]:
    """Returns, for each local physical expert, its expert and its share of that expert's load."""
    slots = range(shard.first, shard.first + shard.num_local)
    return [(slot % num_experts, Fraction(1, num_copies(num_experts, shard, slot))) for slot in slots]


def _load(layer: MoELayer, regime: Regime, rank: int) -> Fraction:
    """Returns a rank's work for a token, in units of k/E slots; in packed rows, in slots of a row.

    A balanced dummy counts slots, whatever they hold, except where the router's law says how many are local.
    """
    shard = regime.shard(layer, rank)
    if regime.layout == "packed":
        return Fraction(min(layer.top_k, shard.num_local))
    if regime.distribution == "balanced" and regime.layout in (None, "slot"):
        return Fraction(shard.num_local)
    return sum((share for _, share in _weights(layer.num_experts, shard)), Fraction())


def _crowding(layer: MoELayer, shard: Shard) -> Fraction:
    """Σ over the router's groups of the squared load of those of the group's experts that are local.

    Two experts of one group are chosen together more often than two of different groups, because a token's experts
    come from few groups. So the number of local slots of a token, whose mean is given, varies the more the more
    crowded the local experts are in few groups, and the fewer tokens have any.
    """
    group_size = layer.num_experts // layer.routing.num_groups
    loads: defaultdict[int, Fraction] = defaultdict(Fraction)
    for expert, share in _weights(layer.num_experts, shard):
        loads[expert // group_size] += share
    return sum((load * load for load in loads.values()), Fraction())


def _fullest(ranks: list[int], value: Callable[[int], Fraction]) -> list[int]:
    values = {rank: value(rank) for rank in ranks}
    most = max(values.values())
    return [rank for rank in ranks if values[rank] == most]


def _nearest_to_mean(ranks: list[int], value: Callable[[int], Fraction]) -> list[int]:
    values = {rank: value(rank) for rank in ranks}
    mean = sum(values.values(), Fraction()) / len(values)
    least = min(abs(one - mean) for one in values.values())
    return [rank for rank in ranks if abs(values[rank] - mean) == least]
