"""Chooses the preferences that a skewed or recorded distribution has."""

from __future__ import annotations

from moetune.recordings.recording import recording_of
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.placed import is_local_skew, skew_shares
from moetune.workload.preferences import Preferences, preferences
from moetune.workload.recorded import recorded
from moetune.workload.router import method_within


def of_scope(layer: MoELayer, regime: Regime, rank: int | None = None) -> Preferences:
    """Returns the preferences over the experts of `placed.skew_shares`.

    Raises:
        UsageError: as `skew_shares`.
    """
    if regime.replay:
        return recorded(recording_of(layer, regime), layer.num_experts)
    values = skew_shares(layer, regime, rank).values
    top_k = min(layer.top_k, len(values))
    method = layer.routing
    if is_local_skew(regime):
        method = method_within(layer, regime.shard(layer, rank).first, len(values))
    return preferences(method, tuple(top_k * value for value in values), top_k)
