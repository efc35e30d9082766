"""Chooses the rank that a tune measures, and compares the loads of ranks. Does not import torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

from moetune.errors import UsageError
from moetune.quoting import quoted
from moetune.spec.enums import RANK_WORDS, RankWord
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard
from moetune.workload.placed import is_local_skew, physical_shares


def tuned_rank(layer: MoELayer, regime: Regime, rank: RankWord | int | None = None) -> int:
    """Returns the rank that a tune measures.

    `mean` chooses the rank with the load nearest to the mean of all ranks, and `fullest` the one with the highest load.
    A rank's load is the expected number of a token's slots on it (k·L/E without redundant experts). Under a skew over
    all experts it follows from the shares of its physical experts, as the engine's balancer has placed them. Of several
    distributions it is the weighted mean. If ranks tie, the router has groups and the layout is deduplicated or pool,
    the spread of their experts over the groups decides in the same way: the more even the spread, the more tokens reach
    the rank. Of ranks that still tie, the lowest number is returned. If all ranks are alike, the result is 0, for every
    value of `rank`.

    Args:
        layer, regime: the deployment.
        rank: `mean`, `fullest` or the number of a rank. None means `mean` for equal shards and `fullest` for unequal
            shards.

    Raises:
        UsageError: `rank` is another word, there is no such rank, or the regime does not fit the layer.
    """
    if rank not in (None, *RANK_WORDS) and type(rank) is not int:
        raise UsageError(f"rank must be {', '.join(RANK_WORDS)} or a number, given {quoted(rank)}.")
    even = equal_shards(layer, regime)
    if isinstance(rank, int):
        regime.shard(layer, rank)
        return 0 if alike(layer, regime) else rank
    if alike(layer, regime):
        return 0
    parts = list(zip(regime.distributions, regime.parts, strict=True))

    def load(one: int) -> Fraction:
        return sum((Fraction(each.weight) * _load(layer, part, one) for each, part in parts), Fraction())

    choose = _fullest if (rank or ("mean" if even else "fullest")) == "fullest" else _nearest_to_mean
    ranks = choose(list(range(regime.ep_size)), load)
    if layer.routing.grouped and regime.layout in ("deduplicated", "pool"):
        ranks = choose(ranks, lambda one: -_crowding(layer, regime.shard(layer, one)))
    return ranks[0]


def of_rank(layer: MoELayer, regime: Regime, rank: RankWord | int | None = None) -> Regime:
    """Returns `regime` with the rank that `tuned_rank` returns. Results are stored under this regime.

    If `rank` is None, it is the rank with which `regime` was constructed, if there is one.

    Raises:
        UsageError: as `tuned_rank`.
    """
    if rank is None and "rank" in regime.model_fields_set:
        rank = regime.rank
    tuned = tuned_rank(layer, regime, rank)
    return regime if rank is None and tuned == regime.rank else regime.model_copy(update={"rank": tuned})


def alike(layer: MoELayer, regime: Regime) -> bool:
    """Returns whether the loads of all ranks differ only in the ids of their experts.

    Unequal shards have different loads. So have equal shards if experts are redundant, if shards cut the router's
    groups in different places, or if the distribution is skewed over all experts. These do not matter in the packed
    layout, because its rows have local experts only, unless a balancer has placed them.
    """
    if not equal_shards(layer, regime):
        return False
    if regime.also:
        return all(alike(layer, part) for part in regime.parts)
    if regime.skew and not is_local_skew(regime):
        return regime.ep_size == 1
    num_local = regime.shard(layer, 0).num_local
    return regime.layout == "packed" or not (regime.redundant_experts or straddles(layer, num_local))


def equal_shards(layer: MoELayer, regime: Regime) -> bool:
    """Returns whether all ranks have equally many physical experts."""
    return (layer.num_experts + regime.redundant_experts) % regime.ep_size == 0


def straddles(layer: MoELayer, num_local: int) -> bool:
    """Returns whether some of the equal shards of `num_local` experts are neither whole groups nor within one group."""
    group_size = layer.num_experts // layer.routing.num_groups
    return layer.routing.grouped and num_local % group_size != 0 and group_size % num_local != 0


def num_copies(num_experts: int, shard: Shard, slot: int) -> int:
    """Returns how many copies the expert of physical expert `slot` has; physical expert s is a copy of s mod E."""
    return (shard.num_physical - 1 - slot % num_experts) // num_experts + 1


def expert_chances(layer: MoELayer, shard: Shard) -> list[float]:
    """Returns, for each local physical expert, the chance that a token selects it: k/E over the number of copies.

    By symmetry of the experts this holds for grouped routers too.
    """
    share = layer.top_k / layer.num_experts
    slots = range(shard.first, shard.first + shard.num_local)
    return [share / num_copies(layer.num_experts, shard, slot) for slot in slots]


def _weights(num_experts: int, shard: Shard) -> list[tuple[int, Fraction]]:
    """Returns, for each local physical expert, the expert that it is a copy of and its share of that expert's load."""
    slots = range(shard.first, shard.first + shard.num_local)
    return [(slot % num_experts, Fraction(1, num_copies(num_experts, shard, slot))) for slot in slots]


def _load(layer: MoELayer, regime: Regime, rank: int) -> Fraction:
    """Returns a rank's load per token, in units of k/E slots; in the packed layout, in slots per row.

    A balanced draw gives all physical experts the same load, also the copies of one expert. So a rank's load is the
    number of its physical experts, except in the layouts in which the router's law decides how many slots are local.
    """
    shard = regime.shard(layer, rank)
    if regime.skew and not is_local_skew(regime):
        share = sum(physical_shares(layer, regime)[shard.first : shard.first + shard.num_local])
        return Fraction(round(share * layer.num_experts * 10**12), 10**12)
    if regime.layout == "packed":
        return Fraction(min(layer.top_k, shard.num_local))
    if regime.distribution == "balanced" and regime.layout in (None, "slot", "batched"):
        return Fraction(shard.num_local)
    return sum((share for _, share in _weights(layer.num_experts, shard)), Fraction())


def _crowding(layer: MoELayer, shard: Shard) -> Fraction:
    """Returns the sum, over the router's groups, of the squared load of the group's local experts.

    A token's experts come from few groups. So two experts of one group are chosen together more often than two of
    different groups. If the local experts lie in few groups, the number of a token's local slots varies more. Its mean
    stays the same, so fewer tokens have a local slot.
    """
    group_size = layer.num_experts // layer.routing.num_groups
    loads: defaultdict[int, Fraction] = defaultdict(Fraction)
    for expert, share in _weights(layer.num_experts, shard):
        loads[expert // group_size] += share
    return sum((load * load for load in loads.values()), Fraction())


def _fullest(ranks: list[int], value: Callable[[int], Fraction]) -> list[int]:
    """Returns the ranks with the highest value."""
    values = {rank: value(rank) for rank in ranks}
    most = max(values.values())
    return [rank for rank in ranks if values[rank] == most]


def _nearest_to_mean(ranks: list[int], value: Callable[[int], Fraction]) -> list[int]:
    """Returns the ranks with values nearest to the mean of all `ranks`."""
    values = {rank: value(rank) for rank in ranks}
    mean = sum(values.values(), Fraction()) / len(values)
    least = min(abs(one - mean) for one in values.values())
    return [rank for rank in ranks if abs(values[rank] - mean) == least]
