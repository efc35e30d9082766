"""The search of Humming's tactics: each configuration of one GEMM, then the best of both together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from moetune.backends.humming.space import AUTO, GEMMS, tactic_of
from moetune.search.base import Batch, Search, Times
from moetune.spec.tactic import Tactic

ROUNDS = (2, 4)
"""How often a tactic is timed: in the first batch and in the second."""
KEPT = 4
"""The configurations of each GEMM that are combined."""
FINALISTS = 6


def humming_search(tactics: Sequence[Tactic], warm_starts: Sequence[Tactic] = ()) -> Search:
    """Times every configuration of one GEMM with the heuristic's for the other, then the best of both together.

    The GEMMs run one after the other, so a configuration that is good for one is good whatever the other's is.

    Args:
        tactics: the candidates.
        warm_starts: tactics that were fast in neighboring buckets; those that are no candidates are ignored.
    """
    known = set(tactics)
    starts = [tactic for tactic in warm_starts if tactic in known]
    times = dict((yield Batch(tuple(dict.fromkeys((*lines(tactics), *starts))), ROUNDS[0])))
    if not times:
        return ()
    pairs = product(*(_best(times, gemm) for gemm in GEMMS))
    combined = (tactic for tactic in (tactic_of(*pair) for pair in pairs) if tactic in known)
    best = tuple(dict.fromkeys((*_ranked(times)[: 2 * FINALISTS], *combined)))
    again = yield Batch(best, ROUNDS[1])
    return tuple(_ranked({tactic: again[tactic] for tactic in best if tactic in again})[:FINALISTS])


def lines(tactics: Sequence[Tactic]) -> list[Tactic]:
    """Returns the tactics in which the heuristic chooses for one GEMM or for both."""
    return [tactic for tactic in tactics if AUTO in tactic.values()]


def _best(times: Times, gemm: str) -> list[str]:
    """Returns the fastest configurations of one GEMM, each measured with the heuristic's for the other."""
    (other,) = set(GEMMS) - {gemm}
    line = {tactic: us for tactic, us in times.items() if tactic[other] == AUTO}
    return [str(tactic[gemm]) for tactic in _ranked(line)[:KEPT]]


def _ranked(times: Times) -> list[Tactic]:
    return sorted(times, key=times.__getitem__)
