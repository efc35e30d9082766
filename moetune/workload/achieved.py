"""Compares the skew that a distribution asks for with the one that is achieved."""

from __future__ import annotations

from collections.abc import Iterable

from moetune.errors import UsageError
from moetune.spec.achieved import AchievedSkew
from moetune.spec.distribution import Replay
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.placed import is_local_skew, skew_shares
from moetune.workload.rank_law import row_chances, scope_preferences, token_chances
from moetune.workload.routing import realize
from moetune.workload.skew import TOLERANCE, effective_experts, largest_parameter, max_over_mean

DRAWN_ROWS = 65536
"""The most rows of the draws whose loads are added for `AchievedSkew.drawn_effective_experts`."""


def achieved(layer: MoELayer, regime: Regime, rows: int, rank: int | None = None) -> AchievedSkew:
    """Returns the asked and the achieved skew of `rank`, None for the regime's rank, with draws of `rows` rows.

    The loads of the regime's draws are added, as many as have `DRAWN_ROWS` rows together, but at least one.

    Raises:
        UsageError: the distribution is not skewed, or as `routing.realize`.
    """
    asked = skew_shares(layer, regime, rank)
    chances = scope_preferences(layer, regime, rank).chances
    in_rows = row_chances(layer, regime, rank)
    numbers = range(max(1, min(regime.draws, DRAWN_ROWS // rows)))
    loads = _sum(realize(layer, regime, rows, rank, number).load.tolist() for number in numbers)
    mean = layer.top_k / regime.ep_size
    return AchievedSkew(
        num_experts=len(chances),
        asked_effective_experts=asked.asked_effective,
        asked_max_over_mean=asked.asked_max_over_mean,
        effective_experts=effective_experts(chances),
        max_over_mean=max_over_mean(chances),
        rank_load=1.0 if is_local_skew(regime) else sum(token_chances(layer, regime, rank)) / mean,
        rank_effective_experts=effective_experts(in_rows),
        rank_max_over_mean=max_over_mean(in_rows),
        drawn_rows=rows,
        drawn_effective_experts=effective_experts(loads),
        drawn_max_over_mean=max_over_mean(loads),
    )


def miss(layer: MoELayer, regime: Regime, rank: int | None = None, *, simulate: bool = False) -> UsageError | None:
    """Returns an error that says the reachable range if the asked effective number of experts is missed, else None.

    It is missed if the achieved one differs by more than 5 %. A recording asks for none.

    Args:
        layer, regime, rank: the deployment.
        simulate: whether to simulate a grouped router, which takes seconds. Otherwise only the limit that distinct ids
            set is checked.
    """
    skew = regime.skew
    if skew is None or isinstance(skew, Replay):
        return None
    asked = skew_shares(layer, regime, rank)
    values = scope_preferences(layer, regime, rank).chances if simulate else asked.values
    found, wanted, size = effective_experts(values), asked.asked_effective, len(values)
    if abs(found / wanted - 1.0) <= TOLERANCE:
        return None
    of = f"the {size} of a rank" if is_local_skew(regime) else str(size)
    least, last = asked.least_effective, largest_parameter(skew, size, asked.least_effective)
    spelled = f"; within 5 %, that is up to {skew.kind}:{last:.4g}" if last else ""
    top_k = min(layer.top_k, size)
    why = f"a row selects {top_k} distinct ones, so none has more than 1/{top_k} of the slots"
    if not asked.missed:
        why = "the router's group limit allows no more"
    return UsageError(
        f"{regime.distribution} asks for {wanted:.4g} effective experts of {of}, and {found:.4g} are achieved: {why}.",
        f"Reachable are {least:.4g} to {size} effective experts{spelled}.",
    )


def _sum(loads: Iterable[list[int]]) -> list[int]:
    return [sum(of_expert) for of_expert in zip(*loads, strict=True)]
