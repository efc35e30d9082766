"""Times every tactic and lets all that are near the best into the final."""

from __future__ import annotations

from collections.abc import Sequence

from moetune.search.base import Batch, Search
from moetune.spec.tactic import Tactic

HOPELESS = 4.0
"""A tactic slower than this times the best one in the first pass is not timed again."""
WITHIN = 1.5
"""A tactic slower than this times the best one is no finalist …"""
LEAST = 4
"""… unless it is among the first this many: the best may yet fall off a cliff."""


def exhaustive(tactics: Sequence[Tactic], *, rounds: int = 2, finalists: int = 20) -> Search:
    """Every tactic once, interleaved; then those that are not hopeless again.

    Args:
        tactics: the candidates.
        rounds: how often a tactic that is not hopeless is timed the second time.
        finalists: how many at most are returned.
    """
    times = dict((yield Batch(tuple(tactics))))
    hopeful = tuple(tactic for tactic in times if times[tactic] <= HOPELESS * min(times.values()))
    if hopeful:
        times |= yield Batch(hopeful, rounds)
    ranked = sorted(times, key=lambda tactic: times[tactic])
    near = sum(times[tactic] <= WITHIN * times[ranked[0]] for tactic in ranked)
    return tuple(ranked[: min(max(near, LEAST), finalists)])
