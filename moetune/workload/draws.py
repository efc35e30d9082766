"""The draws of a bucket: sampled routings, each with its number of rows and its purpose."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
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
FINAL_DRAWS = 4
"""The most draws of a final comparison, as a multiple of the search's draws. The least is the number of the search."""


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """One sampled routing of a bucket and what it is for.

    `routing` may be padded with rows of −1, so that all draws of a bucket have equal shapes; `rows` counts the others.
    `stress_factor` is set for stress draws only.
    """

    routing: Routing
    rows: int
    kind: DrawKind
    stress_factor: int | None = None


def as_draws(routings: Iterable[Routing], kind: DrawKind = "search") -> tuple[Draw, ...]:
    """Returns one draw for each routing, without padding."""
    return tuple(Draw(routing, len(routing.topk_ids), kind) for routing in routings)


def typical_rows(layer: MoELayer, regime: Regime, bucket: int, rank: int | None = None) -> int:
    """Returns the most likely row count that an engine maps to `bucket`.

    This is the bucket itself if a whole number of tokens per rank produces it exactly, or if the ladder is a list.
    Otherwise it comes from a token count: of all that map to the bucket, the one that the highest power of two divides.
    Engines run batches of round sizes (vLLM and SGLang capture CUDA graphs for multiples of 8). For example, 64 tokens
    on each of 32 ranks produce 471 deduplicated rows of Qwen3-235B, and engines map 471 to the bucket 512.
    """
    per_token = rows_for_tokens(layer, regime, 1, rank)
    served = regime.ladder.served(bucket, regime.tune_max_num_tokens)
    if regime.ladder.name == "list" or not served or (bucket / per_token).is_integer():
        return bucket
    tokens = _roundest(math.ceil(served[0] / per_token), math.floor(served[-1] / per_token))
    return round(tokens * per_token) if tokens else bucket


def sampled(
    layer: MoELayer,
    regime: Regime,
    bucket: int,
    typical: int,
    numbers: Iterable[int],
    kind: DrawKind,
    rank: int | None = None,
) -> tuple[Draw, ...]:
    """Returns the bucket's draws with these numbers; even ones have `bucket` rows and odd ones `typical` rows.

    The best tactic can differ between the two row counts, because a kernel's time jumps where an expert's rows begin
    another tile. The best tactic for 512 rows is up to 4 % slower than the best for 471 rows. For 4096 and 3768 rows it
    is 9 % (H200, FlashInfer's CUTLASS kernels). All draws are padded to the larger row count.

    Args:
        layer, regime, rank: the deployment, as for `routing.realize`.
        bucket: the bucket's own rows.
        typical: the bucket's typical rows, see `typical_rows`.
        numbers: the draw numbers that are passed to `realize`.
        kind: the purpose of the draws.

    Raises:
        UsageError: as `routing.realize`.
    """
    padded_rows = max(bucket, typical)
    rows = {number: typical if number % 2 else bucket for number in numbers}
    return tuple(
        Draw(padded(realize(layer, regime, of_draw, rank, number), padded_rows), of_draw, kind)
        for number, of_draw in rows.items()
    )


def stressed(layer: MoELayer, regime: Regime, draw: Draw, factor: int, rank: int | None = None) -> Draw:
    """Returns a stress draw: `draw` with `factor` times the load of its busiest expert.

    Raises:
        UsageError: as `routing.stress`.
    """
    return Draw(stress(layer, regime, draw.routing, rank, factor), draw.rows, "stress", factor)


def bucket_draws(layer: MoELayer, regime: Regime, bucket: int, typical: int) -> tuple[Draw, ...]:
    """Returns all draws of one bucket for the regime's rank: of the search, of the final comparison, and of stress."""
    end = regime.draws + num_final(regime.draws, bucket, regime.shard(layer).num_local)
    search = sampled(layer, regime, bucket, typical, range(regime.draws), "search")
    final = sampled(layer, regime, bucket, typical, range(regime.draws, end), "final")
    stress_draws = (stressed(layer, regime, search[0], factor) for factor in STRESS_FACTORS)
    return (*search, *final, *stress_draws)


def side_by_side_draws(layer: MoELayer, regime: Regime, bucket: int) -> tuple[Draw, ...]:
    """Returns `regime.draws` draws for a comparison of backends, which no search and no final comparison used."""
    return sampled(layer, regime, bucket, typical_rows(layer, regime, bucket), untouched(regime.draws), "final")


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


def _roundest(first: int, last: int) -> int:
    """Returns the number among `first` … `last` that the highest power of two divides, or 0 if there is no number."""
    if first > last:
        return 0
    step = 1 << last.bit_length() - 1
    while last // step * step < first:
        step //= 2
    return last // step * step
