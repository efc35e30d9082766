"""The tactics of one op call, asked of FlashInfer's own enumeration at the loads that can really come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from moetune.spec.tactic import UNTUNED, Tactic
from moetune.workload.routing import Routing

DEFAULT_TACTIC = Tactic(tile_n=UNTUNED, config=UNTUNED)
"""The launcher's own choice, which is what runs where nothing is tuned."""

Enumerate = Callable[[int], Iterable[Sequence[int]]]
"""The valid `[tile_n, config]` for a number of rows."""


def to_kernel(tactic: Tactic) -> list[int]:
    """`[tile_n, config]`, as the kernels and FlashInfer's cache files spell a tactic."""
    return [int(tactic["tile_n"]), int(tactic["config"])]


def equivalent_rows(routing: Routing, num_local: int) -> tuple[int, ...]:
    """The rows M at which to enumerate for a load, ascending: its own, its mean's and its busiest expert's.

    The launcher keeps tiles of the size of M·k/L tokens an expert, half of it, twice and four times, as if every slot
    were local (`computeSelectedTileN`; flashinfer #3998). A load whose experts get t tokens each is that of
    M' = t·L/k rows with all slots local.
    """
    rows, top_k = routing.topk_ids.shape
    loads = (routing.load.double().mean().item(), float(routing.load.max()))
    return tuple(sorted({rows, *(max(1, math.ceil(load * num_local / top_k)) for load in loads)}))


def enumerate_tactics(valid: Enumerate, rows: Iterable[int]) -> tuple[Tactic, ...]:
    """The default, then each tactic that is valid at one of `rows`, in the order of the enumeration."""
    pairs = dict.fromkeys((int(tile_n), int(config)) for m in rows for tile_n, config in valid(m))
    return (DEFAULT_TACTIC, *(Tactic(tile_n=tile_n, config=config) for tile_n, config in pairs))
