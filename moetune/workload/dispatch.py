"""What the dispatch makes of T tokens a rank: rows, local slots, active experts, bytes on the wire.

Loads are in closed form; each formula's derivation stands beside it. They rest on one law, how many of a token's
slots are local (`law.local_slot_law`), which is itself in closed form except for grouped routers; of these some come
from the seeded router. Where a function takes no rank, it is the regime's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard
from moetune.workload.law import Chances, LocalSlotLaw, expert_shares, local_slot_law
from moetune.workload.ranks import expert_chances, num_copies
from moetune.workload.router import representative_shard
from moetune.workload.routing import Routing, padded, realize


@dataclass(frozen=True, slots=True)
class Expectation:
    """What one rank's kernel sees in a bucket of `rows` rows, on average over draws.

    `tokens`: the tokens a rank that stand for `rows` rows. `local_slots`: slots of local experts, `slots_per_expert`
    of one of them; `active_experts`: local experts with at least one. `hit_fraction`: the chance that a token has
    something for the rank. `simulated`: whether the law behind these numbers was simulated.
    """

    rows: int
    tokens: float
    local_slots: float
    slots_per_expert: float
    active_experts: float
    hit_fraction: float
    simulated: bool


def rows_for_tokens(layer: MoELayer, regime: Regime, tokens: float, rank: int | None = None) -> float:
    """Expected rows that enter `rank`'s kernel when each of the ep ranks sends `tokens` tokens."""
    return tokens * _rows_per_token(layer, regime, rank)


def tokens_for_rows(layer: MoELayer, regime: Regime, rows: float, rank: int | None = None) -> float:
    """Tokens a rank for which `rank`'s kernel sees `rows` rows: the inverse of `rows_for_tokens`."""
    return rows / _rows_per_token(layer, regime, rank)


def met_rows(layer: MoELayer, regime: Regime, bucket: int, rank: int | None = None) -> int:
    """The rows that are likely to look `bucket` up: its own where some number of tokens a rank brings just those.

    Elsewhere those that the roundest number of tokens brings, of all that look it up. Engines run batches of round
    sizes (vLLM and SGLang capture CUDA graphs for multiples of 8): 64 tokens on each of 32 ranks bring 471 deduplicated
    rows of Qwen3-235B, which look 512 up. The buckets of a list are taken at their word.
    """
    per_token = _rows_per_token(layer, regime, rank)
    served = regime.ladder.served(bucket, regime.tune_max_num_tokens)
    if regime.ladder.name == "list" or not served or (bucket / per_token).is_integer():
        return bucket
    tokens = _roundest(math.ceil(served[0] / per_token), math.floor(served[-1] / per_token))
    return round(tokens * per_token) if tokens else bucket


def dummies(
    layer: MoELayer, regime: Regime, bucket: int, met: int, draws: Iterable[int], rank: int | None = None
) -> tuple[Routing, ...]:
    """A bucket's draws: even ones of as many rows as the bucket has, odd ones of the `met` rows (see `met_rows`).

    A kernel's time jumps where an expert's rows begin another tile, so a tactic that is best for the one can be far
    behind for the other: with 512 and 471 rows, as above, by 4 % (H200, FlashInfer's CUTLASS kernels), and by 9 % with
    4096 and 3768. All draws have the rows of the larger; what a draw lacks are rows of nothing (−1).

    Raises:
        UsageError: as `routing.realize`.
    """
    most = max(bucket, met)
    return tuple(padded(realize(layer, regime, met if draw % 2 else bucket, rank, draw), most) for draw in draws)


def _roundest(first: int, last: int) -> int:
    """The one of `first` … `last` that the highest power of two divides; 0 where there is none."""
    if first > last:
        return 0
    step = 1 << last.bit_length() - 1
    while last // step * step < first:
        step //= 2
    return last // step * step


def _rows_per_token(layer: MoELayer, regime: Regime, rank: int | None) -> float:
    """Rows for one token a rank. All ep ranks send, so a rank meets ep tokens for each one of its own.

    `none`: every rank holds the same rows. `packed`: a dummy whose row stands for one token. `deduplicated`: those
    with something for the rank. `slot`: every local slot a row of its own, ep·k·L/E of them (k where ep divides E).
    """
    shard = regime.shard(layer, rank)
    match regime.layout or regime.dispatch:
        case "allgather" | "pool":
            return regime.ep_size
        case "deduplicated":
            return regime.ep_size * _law(layer, regime, rank).hit_fraction
        case "slot":
            return regime.ep_size * sum(expert_chances(layer, shard))
        case _:
            return 1


def expect(layer: MoELayer, regime: Regime, rows: int, rank: int | None = None) -> Expectation:
    """What `rank`'s kernel sees in `rows` rows on average.

    A balanced dummy has one load but for its names, so its numbers are counted from draw 0.

    Raises:
        UsageError: as `routing.realize`.
    """
    shard = regime.shard(layer, rank)
    law = _law(layer, regime, rank)
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
    """Expected slots of `rank`'s experts in `rows` rows of random routing.

    A row of the global router has Σ P(slot) over the local slots, k·L/E without redundant experts. Of deduplicated
    rows only those that have one remain, so the same slots lie in `hit_fraction` of the rows.
    """
    return float(rows * sum(_row_chances(layer, regime, rank)))


def active_experts(layer: MoELayer, regime: Regime, rows: int, rank: int | None = None) -> float:
    """Expected local experts (slots, where redundant) that have at least one of `rows` rows of random routing.

    Rows are independent, so a slot that a row holds with chance p is active with 1 − (1 − p)^M. By symmetry p is
    k/E over the replicas of the expert, for grouped routers too; min(k, L)/L in packed rows; divided by the hit
    fraction in deduplicated ones. The slot layout cuts rows into slots: see `_idle_chance_of_slots`.
    """
    if regime.layout == "slot":
        law, kinds = _law(layer, regime, rank), expert_shares(layer, *_of_law(layer, regime, rank))
        return sum(slots * (1.0 - _idle_chance_of_slots(law, shares, rows)) for slots, shares in kinds)
    return sum(1.0 - (1.0 - min(chance, 1.0)) ** rows for chance in _row_chances(layer, regime, rank))


def _row_chances(layer: MoELayer, regime: Regime, rank: int | None) -> list[float]:
    """For each local slot, the chance that a row of random routing holds it."""
    shard = regime.shard(layer, rank)
    match regime.layout:
        case "packed":
            distinct = min(shard.num_local, layer.num_experts)
            within = Shard(0, 0, shard.num_local, shard.num_local)
            share = min(layer.top_k, distinct) / distinct
            return [share / num_copies(distinct, within, slot) for slot in range(shard.num_local)]
        case "slot":
            return [1.0 / shard.num_local] * shard.num_local
        case "deduplicated":
            hit = _law(layer, regime, rank).hit_fraction
            return [chance / hit for chance in expert_chances(layer, shard)]
        case _:
            return expert_chances(layer, shard)


def _idle_chance_of_slots(law: LocalSlotLaw, shares: Chances, slots: int) -> float:
    """The chance that a given local expert has none of the first `slots` local slots of arriving rows.

    An arriving row brings c slots with the law's chance given c ≥ 1, in random order; the expert is among them with
    chance `shares[c]`, c/L where the local ones are alike. The last row is cut to the m slots that are left, in which
    it is with chance `shares[c]`·m/c. Hence the recursion over the slots that are left,
    f(m) = Σ_c p(c)·(c ≤ m: (1 − shares[c])·f(m − c); c > m: 1 − shares[c]·m/c), f(0) = 1.
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


def _law(layer: MoELayer, regime: Regime, rank: int | None) -> LocalSlotLaw:
    return local_slot_law(layer, *_of_law(layer, regime, rank))


def _of_law(layer: MoELayer, regime: Regime, rank: int | None) -> tuple[Shard, int]:
    return representative_shard(layer, regime, rank), regime.seed
