"""Computes which expert each physical expert is a copy of, and its share of all slots. Does not import torch."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from moetune.errors import UsageError
from moetune.recordings.recording import recording_of
from moetune.spec.distribution import Replay
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.eplb import placement
from moetune.workload.skew import Shares, counted_shares, shares


def is_local_skew(regime: Regime) -> bool:
    """Returns whether the skew is over the experts of one rank, and not over all experts.

    It is in the packed layout, whose rows have local experts only. If a balancer has placed the experts, the skew is
    over all experts there too, because the balancer has decided what is left of it on a rank. A recording is always of
    all experts.
    """
    return regime.layout == "packed" and regime.eplb is None and regime.replay is None


def skew_shares(layer: MoELayer, regime: Regime, rank: int | None = None) -> Shares:
    """Returns the shares of the experts over which the regime's distribution is skewed.

    These are all experts, or those of `rank` where `is_local_skew` says so.

    Raises:
        UsageError: the regime does not fit the layer, there is no such rank, the distribution is not skewed, or its
            recording is not at hand.
    """
    skew = regime.skew
    if skew is None:
        raise UsageError(f"Distribution {regime.distribution} is not skewed.")
    if isinstance(skew, Replay):
        return counted_shares(tuple(recording_of(layer, regime).slots(layer.num_experts)), layer.top_k)
    scope = regime.shard(layer, rank).num_local if is_local_skew(regime) else layer.num_experts
    return shares(skew, scope, layer.top_k, regime.seed)


def copies_of(layer: MoELayer, regime: Regime) -> tuple[int, ...]:
    """Returns the expert of each physical expert: as the engine's balancer places them, otherwise s mod E.

    Raises:
        UsageError: as `eplb.placement`.
    """
    num_physical = layer.num_experts + regime.redundant_experts
    if regime.eplb is None or regime.skew is None:
        return tuple(slot % layer.num_experts for slot in range(num_physical))
    loads = skew_shares(layer, regime).values
    return _placed(loads, num_physical, regime.ep_size, regime.eplb)


_placed = lru_cache(maxsize=64)(placement)


def physical_shares(layer: MoELayer, regime: Regime) -> tuple[float, ...]:
    """Returns the share of all slots that each physical expert gets under a skew over all experts.

    The copies of an expert share its slots equally.
    """
    experts, values = copies_of(layer, regime), skew_shares(layer, regime).values
    counts = Counter(experts)
    return tuple(values[expert] / counts[expert] for expert in experts)


def local_parts(layer: MoELayer, regime: Regime, rank: int | None = None) -> list[float]:
    """Returns, for each expert, its copies on `rank` over all its copies; None means the regime's rank."""
    shard, experts = regime.shard(layer, rank), copies_of(layer, regime)
    counts, local = Counter(experts), Counter(experts[shard.first : shard.first + shard.num_local])
    return [local[expert] / counts[expert] for expert in range(layer.num_experts)]
