"""The draws of a bucket: sampled routings, each with its number of rows and its purpose."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.dispatch import rows_for_tokens
from moetune.workload.routing import Routing, padded, realize, stress

DrawKind = Literal["search", "final", "stress"]

STRESS_FACTORS = (2, 3, 4)
"""The busiest expert of a stress draw has one of these multiples of its load."""
FINAL_ROWS = (4096, 65536)
"""The least and the most rows that all draws of a final comparison have together. The least, because small draws differ
much from each other; the most, because large draws take long to make."""
FINAL_EXPERTS = 512
"""The least number of local experts that all draws of a final comparison have together."""
FINAL_LEAST = 4
"""The least number of draws of a final comparison at each of several row counts."""
WIDE = 1.5
"""Between two row counts at which a bucket is compared, a third one lies if their ratio is larger than this."""
BATCHED_FRACTIONS = (4, 1, 16, 64)
"""In the layout batched one tactic serves every step. It is compared at the most tokens of a rank over each of these,
the typical step first."""
FINAL_DRAWS = 4
"""The most draws of a final comparison, as a multiple of the search's draws. The least is the number of the search."""


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """One sampled routing of a bucket and what it is for.

    `routing` may be padded with rows of −1, so that all draws of a bucket have equal shapes; `rows` counts the others.
    `stress_factor` is set for stress draws only. `distribution` is empty if the regime has one distribution.
    """

    routing: Routing
    rows: int
    kind: DrawKind
    stress_factor: int | None = None
    distribution: str = ""


def as_draws(routings: Iterable[Routing], kind: DrawKind = "search", distribution: str = "") -> tuple[Draw, ...]:
    """Returns one draw for each routing, without padding."""
    return tuple(Draw(routing, len(routing.topk_ids), kind, distribution=distribution) for routing in routings)


def named_parts(regime: Regime) -> dict[str, Regime]:
    """Returns `Regime.parts` by the name that their draws have: empty if there is one distribution."""
    return {part.distribution if regime.also else "": part for part in regime.parts}


def typical_rows(layer: MoELayer, regime: Regime, bucket: int, rank: int | None = None) -> int:
    """Returns the most likely row count that an engine maps to `bucket`.

    This is the bucket itself if a whole number of tokens per rank produces it exactly, or if the ladder is a list (and
    a pool can have it). Otherwise it comes from a token count: of all that map to the bucket, the one that the highest
    power of two divides. Engines run batches of round sizes (vLLM and SGLang capture CUDA graphs for multiples of 8).
    For example, 64 tokens on each of 32 ranks produce 471 deduplicated rows of Qwen3-235B, and engines map 471 to the
    bucket 512. In the layout batched a step has typically a quarter of the tokens that fit into the buffer.
    """
    if regime.layout == "batched":
        return _batched_rows(regime)[0]
    per_token = rows_for_tokens(layer, regime, 1, rank)
    is_own = regime.ladder.name == "list" or (bucket / per_token).is_integer()
    if is_own and regime.can_have(bucket):
        return bucket
    tokens = _tokens(regime, bucket, per_token)
    return round(_roundest(tokens) * per_token) if tokens else bucket


def compared_rows(layer: MoELayer, regime: Regime, bucket: int, rank: int | None = None) -> tuple[int, ...]:
    """Returns the row counts at which the tactics of `bucket` are compared, the most likely one first.

    One tactic serves all rows that an engine maps to the bucket, so it is measured at several of them: the typical
    rows, the fewest, the most, the bucket itself, and one between two that are more than `WIDE` apart. A bucket of a
    list is compared at its own rows alone. In the layout batched they are the tokens of all ranks in steps of different
    sizes.
    """
    if regime.layout == "batched":
        return _batched_rows(regime)
    typical = typical_rows(layer, regime, bucket, rank)
    if regime.ladder.name == "list":
        return (typical,)
    served = regime.served(bucket)
    ends = (served[0], served[-1]) if served else ()
    own = (bucket,) if regime.can_have(bucket) else ()
    compared = (typical, *ends, *own)
    between = (_middle(served, lower, upper) for lower, upper in pairwise(sorted(compared)) if upper > WIDE * lower)
    return tuple(dict.fromkeys((*compared, *between)))


def _batched_rows(regime: Regime) -> tuple[int, ...]:
    """Returns the tokens of all ranks in steps of the layout batched, the typical step first."""
    most = regime.capacity // regime.ep_size
    return tuple(dict.fromkeys(max(1, most // fraction) * regime.ep_size for fraction in BATCHED_FRACTIONS))


def _middle(served: range, lower: int, upper: int) -> int:
    """Returns the one of `served` that lies in the middle of `lower` and `upper` by ratio."""
    return served[bisect_left(served, math.sqrt(lower * upper))]


def sampled(
    layer: MoELayer,
    regime: Regime,
    bucket: int,
    typical: int,
    numbers: Iterable[int],
    kind: DrawKind,
    rank: int | None = None,
    padded_to: int = 0,
    distribution: str = "",
) -> tuple[Draw, ...]:
    """Returns the bucket's draws with these numbers; even ones have `bucket` rows and odd ones `typical` rows.

    All have `typical` rows if a pool cannot have `bucket` rows. In the layout batched the draws have the row counts of
    `compared_rows` in turn.

    The best tactic can differ between the two row counts, because a kernel's time jumps where an expert's rows begin
    another tile. The best tactic for 512 rows is up to 4 % slower than the best for 471 rows. For 4096 and 3768 rows it
    is 9 % (H200, FlashInfer's CUTLASS kernels). All draws are padded to the larger row count, or to `padded_to`.

    Args:
        layer, regime, rank: the deployment, as for `routing.realize`.
        bucket: the bucket's own rows.
        typical: the bucket's typical rows, see `typical_rows`.
        numbers: the draw numbers that are passed to `realize`.
        kind: the purpose of the draws.
        padded_to: the least number of rows of the padded draws.
        distribution: the name that the draws get, see `named_parts`.

    Raises:
        UsageError: as `routing.realize`.
    """
    own = bucket if regime.can_have(bucket) else typical
    counts = _batched_rows(regime) if regime.layout == "batched" else (own, typical)
    padded_rows = max(own, typical, padded_to)
    rows = {number: counts[number % len(counts)] for number in numbers}
    return tuple(
        Draw(padded(realize(layer, regime, of_draw, rank, number), padded_rows), of_draw, kind, None, distribution)
        for number, of_draw in rows.items()
    )


def stressed(layer: MoELayer, regime: Regime, draw: Draw, factor: int, rank: int | None = None) -> Draw:
    """Returns a stress draw: `draw` with `factor` times the load of its busiest expert.

    Raises:
        UsageError: as `routing.stress`.
    """
    return Draw(stress(layer, regime, draw.routing, rank, factor), draw.rows, "stress", factor, draw.distribution)


def search_draws(layer: MoELayer, regime: Regime, bucket: int) -> tuple[Draw, ...]:
    """Returns the draws of a bucket's search, then its stress draws, for the regime's rank, all of one padded shape.

    Of several distributions the search has a draw of each in turn. The stress draws are of the main one.
    """
    search = _of_all_parts(layer, regime, bucket, lambda part, weight: range(part.draws), "search")
    return (*search, *(stressed(layer, regime.parts[0], search[0], factor) for factor in STRESS_FACTORS))


def _of_all_parts(
    layer: MoELayer, regime: Regime, bucket: int, numbers: Callable[[Regime, float], range], kind: DrawKind
) -> tuple[Draw, ...]:
    """Returns the bucket's draws of every distribution, evenly mixed and all of one padded shape.

    Args:
        layer, regime, bucket: what is sampled, for the regime's rank.
        numbers: returns the draw numbers of one distribution, given its regime and its weight.
        kind: the purpose of the draws.
    """
    parts = named_parts(regime)
    typical = {name: typical_rows(layer, part, bucket) for name, part in parts.items()}
    padded_to = max(*typical.values(), bucket if regime.can_have(bucket) else 0)
    places: list[tuple[float, Draw]] = []
    for (name, part), each in zip(parts.items(), regime.distributions, strict=True):
        chosen = numbers(part, each.weight)
        drawn = sampled(layer, part, bucket, typical[name], chosen, kind, None, padded_to, name)
        places += [((at + 0.5) / len(drawn), draw) for at, draw in enumerate(drawn)]
    return tuple(draw for _, draw in sorted(places, key=lambda place: place[0]))


def final_draws(
    layer: MoELayer, regime: Regime, rows: int, num_row_counts: int = 1, distribution: str = ""
) -> tuple[Draw, ...]:
    """Returns the draws of a final comparison at `rows` rows, which the search has not used.

    Args:
        layer, regime: what is sampled, for the regime's rank. The regime has one distribution.
        rows: the row count of all these draws.
        num_row_counts: how many row counts the bucket is compared at; they share the bucket's number of draws.
        distribution: the name that the draws get, see `named_parts`.

    Raises:
        UsageError: as `routing.realize`.
    """
    in_all = num_final(regime.draws, rows, regime.shard(layer).num_local)
    count = max(-(-in_all // num_row_counts), min(in_all, FINAL_LEAST))
    numbers = range(regime.draws, regime.draws + count)
    return as_draws((realize(layer, regime, rows, None, number) for number in numbers), "final", distribution)


def side_by_side_draws(layer: MoELayer, regime: Regime, bucket: int) -> tuple[Draw, ...]:
    """Returns about `regime.draws` draws for a comparison of backends, which no search and no final comparison used.

    Each distribution has as many as its weight asks for, but at least one.
    """

    def numbers(part: Regime, weight: float) -> range:
        return untouched(regime.draws)[: max(1, round(weight * regime.draws))]

    return _of_all_parts(layer, regime, bucket, numbers, "final")


def untouched(num_search: int) -> range:
    """Returns `num_search` draw numbers that neither the search nor the final comparison of a tune uses."""
    first = (1 + FINAL_DRAWS) * num_search
    return range(first, first + num_search)


def num_final(num_search: int, rows: int, num_local: int) -> int:
    """Returns the number of draws of a final comparison.

    Args:
        num_search: the number of the search's draws.
        rows: the bucket.
        num_local: the number of local experts.
    """
    least, most = (limit // rows for limit in FINAL_ROWS)
    return max(num_search, min(max(least, FINAL_EXPERTS // num_local), most, FINAL_DRAWS * num_search))


def _tokens(regime: Regime, bucket: int, per_token: float) -> range:
    """Returns the token counts of a rank whose rows map to `bucket`; `per_token` is the rows that one produces."""
    served = regime.ladder.served(bucket, regime.tune_max_num_tokens)
    if not served:
        return range(0)
    return range(math.ceil(served[0] / per_token), math.floor(served[-1] / per_token) + 1)


def _roundest(counts: range) -> int:
    """Returns the one of `counts` that the highest power of two divides."""
    first, last = counts[0], counts[-1]
    step = 1 << last.bit_length() - 1
    while last // step * step < first:
        step //= 2
    return last // step * step
