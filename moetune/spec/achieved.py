"""`AchievedSkew`: the skew that a distribution asks for, and the one that its draws have."""

from __future__ import annotations

from moetune.spec.model import FrozenModel


class AchievedSkew(FrozenModel):
    """The asked and the achieved skew. The effective number of experts is 1 / Σ share² over their shares of the slots.

    Attributes:
        num_experts: the experts over which the distribution is skewed: all, or those of one rank in packed rows.
        asked_effective_experts: the effective number that the distribution asks for.
        asked_max_over_mean: the asked load of the busiest expert over the mean load; None for `ddist`, which asks for
            the effective number alone.
        effective_experts: the effective number that is achieved, on average over draws.
        max_over_mean: the load of the busiest expert over the mean load, on average over draws.
        rank_load: the rank's load over the mean load of a rank; 1 in packed rows without a balancer.
        rank_effective_experts: the effective number of the rank's physical experts, on average over draws.
        rank_max_over_mean: the load of the busiest of them over their mean load, on average over draws.
        drawn_rows: the rows of the draws that are counted for the next two fields: those of the largest bucket.
        drawn_effective_experts: the effective number of the rank's physical experts, from the added loads of draws.
        drawn_max_over_mean: the load of the busiest of them over their mean load, from the same loads.
    """

    num_experts: int
    asked_effective_experts: float
    asked_max_over_mean: float | None
    effective_experts: float
    max_over_mean: float
    rank_load: float
    rank_effective_experts: float
    rank_max_over_mean: float
    drawn_rows: int
    drawn_effective_experts: float
    drawn_max_over_mean: float
