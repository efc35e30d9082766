"""Computes the expected load of a rank: rows, local slots and active experts.

All formulas use the distribution of a token's local slots (`law.local_slot_law`). This distribution has a closed form,
except for some grouped routers, for which it is simulated. Without a `rank`, a function uses the regime's rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.law import Chances, LocalSlotLaw, expert_shares
from moetune.workload.rank_law import reached, row_chances, slot_law, token_chances
from moetune.workload.router import representative_shard
from moetune.workload.routing import realize


@dataclass(frozen=True, slots=True)
class Expectation:
    """The expected load of one rank's kernel in `rows` rows.

    Attributes:
        rows: rows in the kernel.
        tokens: tokens per rank that produce these rows.
        local_slots: slots of local experts.
        slots_per_expert: `local_slots` over the number of local experts.
        active_experts: local experts with at least one slot.
        hit_fraction: the chance that a token has a slot on the rank.
        simulated: whether the numbers come from simulated routing.
    """

    rows: int
    tokens: float
    local_slots: float
    slots_per_expert: float
    active_experts: float
    hit_fraction: float
    simulated: bool


def rows_for_tokens(layer: MoELayer, regime: Regime, tokens: float, rank: int | None = None) -> float:
    """Returns the expected rows that enter `rank`'s kernel when each of the ep ranks sends `tokens` tokens."""
    return tokens * _rows_per_token(layer, regime, rank)


def tokens_for_rows(layer: MoELayer, regime: Regime, rows: float, rank: int | None = None) -> float:
    """Returns the tokens per rank that produce `rows` rows in `rank`'s kernel, the inverse of `rows_for_tokens`."""
    return rows / _rows_per_token(layer, regime, rank)


def _rows_per_token(layer: MoELayer, regime: Regime, rank: int | None) -> float:
    """Returns the expected rows in the kernel when each of the ep ranks sends one token.

    It is one row without a dispatch and in the packed layout, and ep rows after an all-gather, in a pool and in the
    batched layout, where a draw's rows are the tokens of all ranks. The deduplicated layout has one row for each token
    with a slot on the rank. The slot layout has one row for each local slot, ep·k·L/E in all (k if ep divides E).

    Raises:
        UsageError: as `rank_law.reached`.
    """
    of = regime.rank if rank is None else rank
    match regime.layout or regime.dispatch:
        case "allgather" | "pool" | "batched":
            return regime.ep_size
        case "deduplicated":
            return regime.ep_size * reached(regime, of, slot_law(layer, regime, rank).hit_fraction)
        case "slot":
            return regime.ep_size * reached(regime, of, sum(token_chances(layer, regime, rank)))
        case _:
            return 1


def expect(layer: MoELayer, regime: Regime, rows: int, rank: int | None = None) -> Expectation:
    """Returns the expected load of `rank`'s kernel in `rows` rows.

    Balanced draws differ only in which expert has which count. So for them the numbers are counted from draw 0.

    Raises:
        UsageError: as `routing.realize`.
    """
    shard = regime.shard(layer, rank)
    law = slot_law(layer, regime, rank)
    if regime.distribution == "balanced":
        load = realize(layer, regime, rows, rank).load
        slots, active = float(load.sum()), float((load > 0).sum())
    else:
        slots = local_slots(layer, regime, rows, rank)
        active = active_experts(layer, regime, rows, rank)
    return Expectation(
        rows=rows,
        tokens=tokens_for_rows(layer, regime, rows, rank),
        local_slots=slots,
        slots_per_expert=slots / shard.num_local,
        active_experts=active,
        hit_fraction=law.hit_fraction,
        simulated=law.simulated,
    )


def local_slots(layer: MoELayer, regime: Regime, rows: int, rank: int | None = None) -> float:
    """Returns the expected slots of `rank`'s experts in `rows` rows of random routing.

    A token has on average as many local slots as the chances of the local experts add up to: k·L/E without redundant
    experts. The deduplicated layout keeps only the tokens with a local slot. So its rows have on average that number
    over the hit fraction.
    """
    return float(rows * sum(row_chances(layer, regime, rank)))


def active_experts(layer: MoELayer, regime: Regime, rows: int, rank: int | None = None) -> float:
    """Returns the expected local physical experts with at least one slot in `rows` rows of random routing.

    Rows are independent. So an expert that a row selects with chance p is active with chance 1 − (1 − p)^M. By symmetry
    p is k/E over the number of copies of the expert, for grouped routers too. It is min(k, L)/L in packed rows. In
    deduplicated rows it is divided by the hit fraction. In the slot layout a row is one slot, and rows are not
    independent: see `_idle_chance_of_slots`. Under a skew the slots of one token are taken as independent there.
    """
    if regime.layout == "slot" and not regime.skew:
        law = slot_law(layer, regime, rank)
        kinds = expert_shares(layer, representative_shard(layer, regime, rank), regime.seed)
        return sum(slots * (1.0 - _idle_chance_of_slots(law, shares, rows)) for slots, shares in kinds)
    return sum(1.0 - (1.0 - min(chance, 1.0)) ** rows for chance in row_chances(layer, regime, rank))


def _idle_chance_of_slots(law: LocalSlotLaw, shares: Chances, slots: int) -> float:
    """Returns the chance that a given local expert has none of the first `slots` local slots of arriving tokens.

    An arriving token has c local slots, in random order, with the law's chance p(c) given c ≥ 1. The expert is among
    them with chance `shares[c]`, which is c/L where local experts are alike. If only m < c slots are left, the last
    token is cut to m slots, and the expert is among these with chance `shares[c]`·m/c. This gives a recursion over the
    number m of slots that are left: f(0) = 1 and f(m) = Σ_c p(c)·g(c), where g(c) is (1 − shares[c])·f(m − c) for
    c ≤ m and 1 − shares[c]·m/c for c > m.
    """
    arriving = [
        (count, chance / law.hit_fraction, shares[count])
        for count, chance in enumerate(law.probabilities)
        if count and chance
    ]
    idle = [1.0]
    for left in range(1, slots + 1):
        idle.append(
            sum(
                chance * ((1.0 - share) * idle[left - count] if count <= left else 1.0 - share * left / count)
                for count, chance, share in arriving
            )
        )
        if idle[-1] < 1e-12:
            return 0.0
    return idle[slots]
