"""Times every tactic and returns those that are near the best as finalists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moetune.search.base import Batch, Search
from moetune.spec.tactic import Tactic

TOGETHER = 64
"""The most tactics of a batch. Each takes device memory while the batch is timed."""
HOPELESS = 4.0
"""A tactic slower than this times the best one in the first pass is not timed again."""
WITHIN = 1.5
"""A tactic slower than this times the best one is no finalist, unless it is among the `LEAST` fastest."""
LEAST = 4
"""The fastest tactics that are finalists in any case, because the best may have a cliff."""


def exhaustive(tactics: Sequence[Tactic], *, rounds: int = 2, finalists: int = 20) -> Search:
    """Times every tactic once, then times those that are not hopeless again, the fastest of the first pass first.

    Tactics that are about equally fast are thus in one batch, and a drift between batches hardly matters.

    Args:
        tactics: the candidates.
        rounds: how often a tactic that is not hopeless is timed the second time.
        finalists: the most tactics that are returned.
    """
    times: dict[Tactic, float] = {}
    for batch in _batches(tactics, 1):
        times |= yield batch
    ranked = sorted(times, key=times.__getitem__)
    hopeful = [tactic for tactic in ranked if times[tactic] <= HOPELESS * times[ranked[0]]]
    for batch in _batches(hopeful, rounds):
        times |= yield batch
    ranked = sorted(times, key=times.__getitem__)
    near = sum(times[tactic] <= WITHIN * times[ranked[0]] for tactic in ranked)
    return tuple(ranked[: min(max(near, LEAST), finalists)])


def _batches(tactics: Sequence[Tactic], rounds: int) -> Iterator[Batch]:
    for start in range(0, len(tactics), TOGETHER):
        yield Batch(tuple(tactics[start : start + TOGETHER]), rounds)
