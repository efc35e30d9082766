"""`Sweep`: the times of FlashInfer's sweep over the tactics of an op, on one rank, and those of the slowest rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moetune.engine.exchange import Exchange
from moetune.engine.op_bench import on_ranks
from moetune.engine.stored import tactic_of
from moetune.engine.strategy import RankStrategy
from moetune.measure.reasons import reason_of
from moetune.spec.tactic import Tactic


@dataclass(eq=False)
class Sweep:
    """The times of the tactics in ms and the reasons of those that failed, by rows.

    `milliseconds` has FlashInfer's own tactics. `uneven`: those that failed on some ranks, but ran on others.
    """

    milliseconds: dict[int, list[tuple[Any, float]]] = field(default_factory=dict)
    failures: dict[int, dict[Tactic, str]] = field(default_factory=dict)
    uneven: dict[Tactic, str] = field(default_factory=dict)

    def timed(self, rows: int, tactic: Any, time_ms: float) -> None:
        """Adds a time."""
        self.milliseconds.setdefault(rows, []).append((tactic, time_ms))

    def failed(self, rows: int, tactic: Any, error: BaseException) -> None:
        """Adds a tactic that failed."""
        self.failures.setdefault(rows, {})[tactic_of(tactic)] = reason_of(error)


def joined(sweeps: Sequence[Sweep], strategy: RankStrategy, ranks: Exchange | None) -> Sweep:
    """Returns one sweep for all ranks. Its time of a tactic is that on the slowest rank.

    A tactic that failed on any rank is a failed one, which names the rank. A tactic that was not timed on every rank
    has no time, except with `parallel`: then one rank has timed it for all.

    Args:
        sweeps: the sweep of each rank, in rank order. With `parallel` they have different tactics.
        strategy: how the ranks share the tactics.
        ranks: the ranks, or None if there is one.
    """
    needed = 1 if strategy is RankStrategy.PARALLEL else len(sweeps)
    found = Sweep()
    for rows in dict.fromkeys(rows for sweep in sweeps for rows in (*sweep.milliseconds, *sweep.failures)):
        failed = on_ranks([sweep.failures.get(rows, {}) for sweep in sweeps], ranks)
        times: dict[Tactic, list[float]] = {}
        natives = {}
        for sweep in sweeps:
            for native, time_ms in sweep.milliseconds.get(rows, []):
                natives[tactic_of(native)] = native
                times.setdefault(tactic_of(native), []).append(time_ms)
        of_all = {tactic: max(of_ranks) for tactic, of_ranks in times.items() if len(of_ranks) >= needed}
        for tactic, time_ms in of_all.items():
            if tactic not in failed and math.isfinite(time_ms):
                found.timed(rows, natives[tactic], time_ms)
        if failed:
            found.failures[rows] = failed
            found.uneven.update((tactic, reason) for tactic, reason in failed.items() if tactic in times)
    return found
