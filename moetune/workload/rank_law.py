"""Computes the chances of a token's slots on one rank: of their number, and of each local physical expert."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from moetune.errors import UsageError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard
from moetune.workload.law import LocalSlotLaw, local_slot_law
from moetune.workload.placed import copies_of, is_local_skew, local_parts
from moetune.workload.preferences import Preferences
from moetune.workload.ranks import expert_chances, num_copies
from moetune.workload.router import representative_shard
from moetune.workload.scope import of_scope
from moetune.workload.skewed import packed

LEAST_HIT = 1e-6


def slot_law(layer: MoELayer, regime: Regime, rank: int | None = None) -> LocalSlotLaw:
    """Returns the distribution of a token's local slots on `rank`; None means the regime's rank.

    Where the skew is over the experts of one rank, it is that of random router logits: tokens are spread evenly over
    the ranks.
    """
    if _is_global(regime):
        return _skewed_law(layer, regime, regime.rank if rank is None else rank)
    return local_slot_law(layer, representative_shard(layer, regime, rank), regime.seed)


def token_chances(layer: MoELayer, regime: Regime, rank: int | None = None) -> list[float]:
    """Returns the chance that a token selects each local physical expert of `rank`.

    By symmetry of the experts it is k/E over the number of copies if the distribution is not skewed.
    """
    shard = regime.shard(layer, rank)
    if not _is_global(regime):
        return expert_chances(layer, shard)
    experts, chances = copies_of(layer, regime), of_scope(layer, regime).chances
    counts = Counter(experts)
    return [chances[expert] / counts[expert] for expert in experts[shard.first : shard.first + shard.num_local]]


def row_chances(layer: MoELayer, regime: Regime, rank: int | None = None) -> list[float]:
    """Returns the chance that a row of `rank`'s kernel selects each local physical expert."""
    shard = regime.shard(layer, rank)
    match regime.layout:
        case "packed" if regime.skew:
            return packed(layer, regime, representative_shard(layer, regime, rank).rank).chances()
        case "packed":
            distinct = min(shard.num_local, layer.num_experts)
            within = Shard(0, 0, shard.num_local, shard.num_local)
            share = min(layer.top_k, distinct) / distinct
            return [share / num_copies(distinct, within, slot) for slot in range(shard.num_local)]
        case "slot" if not regime.skew:
            return [1.0 / shard.num_local] * shard.num_local
        case "slot":
            chances = token_chances(layer, regime, rank)
            total = reached(regime, shard.rank, sum(chances))
            return [chance / total for chance in chances]
        case "deduplicated":
            hit = reached(regime, shard.rank, slot_law(layer, regime, rank).hit_fraction)
            return [chance / hit for chance in token_chances(layer, regime, rank)]
        case _:
            return token_chances(layer, regime, rank)


def reached(regime: Regime, rank: int, hit: float) -> float:
    """Returns the chance `hit` that a token has a slot on `rank`, or its mean number of slots there.

    Raises:
        UsageError: it is below 1e-6. Only a skew can have such ranks.
    """
    if hit < LEAST_HIT:
        raise UsageError(
            f"Under {regime.distribution} rank {rank} gets no tokens, so there is nothing to measure.",
            "Choose another rank, such as --rank fullest.",
        )
    return hit


def scope_preferences(layer: MoELayer, regime: Regime, rank: int | None = None) -> Preferences:
    """Returns the preferences over the experts over which the distribution is skewed, for `rank`'s kernel."""
    return of_scope(layer, regime, representative_shard(layer, regime, rank).rank)


def _is_global(regime: Regime) -> bool:
    return regime.skew is not None and not is_local_skew(regime)


@lru_cache(maxsize=1024)
def _skewed_law(layer: MoELayer, regime: Regime, rank: int) -> LocalSlotLaw:
    scope = of_scope(layer, regime)
    return LocalSlotLaw(scope.local_slots(local_parts(layer, regime, rank)), scope.simulated)
