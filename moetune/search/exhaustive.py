"""Times every tactic and lets all that are near the best into the final."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moetune.search.base import Batch, Search
from moetune.spec.tactic import Tactic

TOGETHER = 64
"""The most tactics of a batch: each holds memory of the device while it is timed side by side with the others."""
HOPELESS = 4.0
"""A tactic slower than this times the best one in the first pass is not timed again."""
WITHIN = 1.5
"""A tactic slower than this times the best one is no finalist …"""
LEAST = 4
"""… unless it is among the first this many: the best may yet fall off a cliff."""


def exhaustive(tactics: Sequence[Tactic], *, rounds: int = 2, finalists: int = 20) -> Search:
    """Every tactic once; then those that are not hopeless again, the best of the first pass first.

    So near-equals are timed side by side, and what drifts between two batches hardly matters.

    Args:
        tactics: the candidates.
        rounds: how often a tactic that is not hopeless is timed the second time.
        finalists: how many at most are returned.
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
