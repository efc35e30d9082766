"""Times every tactic and lets all that are near the best into the final."""

from __future__ import annotations

from collections.abc import Sequence

from moetune.search.base import Batch, Search
from moetune.spec.tactic import Tactic

WITHIN = 1.5
"""A tactic slower than this times the best one in the first pass is no finalist …"""
LEAST = 4
"""… unless it is among the first this many: the best may yet fall off a cliff."""


def exhaustive(tactics: Sequence[Tactic], *, rounds: int = 2, finalists: int = 20) -> Search:
    """Every tactic once, in one interleaved batch.

    Args:
        tactics: the candidates.
        rounds: how often each is timed.
        finalists: how many at most are returned.
    """
    times = yield Batch(tuple(tactics), rounds)
    ranked = sorted(times, key=lambda tactic: times[tactic])
    near = sum(times[tactic] <= WITHIN * times[ranked[0]] for tactic in ranked)
    return tuple(ranked[: min(max(near, LEAST), finalists)])
