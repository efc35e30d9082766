"""The search of Marlin's tactics: block sizes first, then the tiles of each GEMM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from moetune.backends.marlin.space import AUTO, tactic_of
from moetune.search.base import Batch, Search, Times
from moetune.spec.tactic import Tactic

ROUNDS = (2, 2, 4)
"""How often a tactic is timed: block sizes and warm starts, tiles of one GEMM, the best combinations."""
NEAR = 1.15
"""A block size within this times the best, each with the kernel's own tiles, has its tiles timed too."""
FINALISTS = 6


def marlin_search(tactics: Sequence[Tactic], warm_starts: Sequence[Tactic] = ()) -> Search:
    """Times every block size with the kernel's own tiles, then each tile of one GEMM for the block sizes near the best.

    The GEMMs run one after the other, so a tile that is good for one is good whatever the other's is. The best tiles of
    both are combined, and the combinations timed. Which tiles are legal depends on the block size, so they cannot be
    swept with one block size and kept for another.

    Args:
        tactics: the candidates.
        warm_starts: tactics that were fast in neighboring buckets; those that are no candidates are ignored.
    """
    known = set(tactics)
    own = [tactic for tactic in tactics if tactic["gemm1"] == tactic["gemm2"] == AUTO]
    starts = [tactic for tactic in warm_starts if tactic in known]
    times = dict((yield Batch(tuple(dict.fromkeys((*own, *starts))), ROUNDS[0])))
    if not times:
        return ()
    alone = {tactic: times[tactic] for tactic in own if tactic in times} or times
    near = [tactic["block_size_m"] for tactic in _ranked(alone) if alone[tactic] <= NEAR * min(alone.values())]
    lines = [
        tactic for tactic in tactics if tactic["block_size_m"] in near and AUTO in (tactic["gemm1"], tactic["gemm2"])
    ]
    times |= yield Batch(tuple(tactic for tactic in lines if tactic not in times), ROUNDS[1])
    combined = (tactic for size in near for tactic in _combined(times, int(size)) if tactic in known)
    best = tuple(dict.fromkeys((*_ranked(times)[: 2 * FINALISTS], *combined)))
    times |= yield Batch(best, ROUNDS[2])
    return tuple(_ranked({tactic: times[tactic] for tactic in best if tactic in times})[:FINALISTS])


def _combined(times: Times, block_size_m: int) -> Iterable[Tactic]:
    """Returns the pairs of the two best tiles of each GEMM, each measured with the other GEMM's own tile."""
    best = []
    for name, other in (("gemm1", "gemm2"), ("gemm2", "gemm1")):
        line = {
            tactic: us
            for tactic, us in times.items()
            if tactic["block_size_m"] == block_size_m and tactic[other] == AUTO
        }
        best.append([str(tactic[name]) for tactic in _ranked(line)[:2]])
    return [tactic_of(block_size_m, first, second) for first, second in product(*best)]


def _ranked(times: Times) -> list[Tactic]:
    return sorted(times, key=times.__getitem__)
