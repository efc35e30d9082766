"""Lists the tactics of one op call by FlashInfer's own enumeration, at the row counts that fit the real load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from moetune.spec.tactic import UNTUNED, Tactic
from moetune.workload.routing import Routing

DEFAULT_TACTIC = Tactic(tile_n=UNTUNED, config=UNTUNED)
"""The launcher's own choice. It runs where nothing is tuned."""

Enumerate = Callable[[int], Iterable[Sequence[int]]]
"""Returns the valid `[tile_n, config]` for a number of rows."""


def to_kernel(tactic: Tactic) -> list[int]:
    """Returns `[tile_n, config]`, the form of a tactic in the kernels and in FlashInfer's cache files."""
    return [int(tactic["tile_n"]), int(tactic["config"])]


def equivalent_rows(routing: Routing, num_local: int) -> tuple[int, ...]:
    """Returns the row counts at which to enumerate for a load, in ascending order.

    The launcher estimates M·k/L tokens an expert, as if every slot were local. It keeps tiles of that size, half of it,
    twice and four times (`computeSelectedTileN`; flashinfer #3998). t tokens an expert correspond to t·L/k rows with
    all slots local. So this returns M, and the row counts that correspond to the load's mean and to its maximum.
    """
    rows, top_k = routing.topk_ids.shape
    loads = (routing.load.double().mean().item(), float(routing.load.max()))
    return tuple(sorted({rows, *(max(1, math.ceil(load * num_local / top_k)) for load in loads)}))


def enumerate_tactics(valid: Enumerate, rows: Iterable[int]) -> tuple[Tactic, ...]:
    """Returns the default, then each tactic that is valid at one of `rows`, in the order of the enumeration."""
    pairs = dict.fromkeys((int(tile_n), int(config)) for m in rows for tile_n, config in valid(m))
    return (DEFAULT_TACTIC, *(Tactic(tile_n=tile_n, config=config) for tile_n, config in pairs))
