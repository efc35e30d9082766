"""Defines `Replay`, which answers a search with the times that an interrupted run has journaled."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from moetune.store.journal import Past

if TYPE_CHECKING:
    from moetune.search.base import Batch
    from moetune.spec.tactic import Tactic


class Replay:
    """Answers the batches of a search from the journal, until the search asks for one that is not there.

    A search is determined by the times that it receives. So it asks for the same batches as before, and goes on where
    it was interrupted. At most the batch that was then being measured is measured again.

    Batches are answered as a whole or not at all, because only times that were taken in turns can be compared to the
    percent. Clock rates drift between batches, within a tune as between two runs in the same environment, so a search
    does not decide by small differences between them: the tactics that matter are timed once more together. The choice
    itself rests on no stored time, because the final comparison times all finalists anew.

    Args:
        past: what the interrupted run left of the bucket.
    """

    def __init__(self, past: Past) -> None:
        self._left = {tactic: deque(times) for tactic, times in past.times_us.items()}
        self._failed = past.failed

    def answer(self, batch: Batch, rounds: int) -> dict[Tactic, float] | None:
        """Returns the times in µs of a batch, without the tactics that failed; None if it must be measured.

        Args:
            batch: what the search asks for.
            rounds: how often each tactic is timed, at all row counts together.
        """
        stored = {tactic: times[0] for tactic in batch.tactics if (times := self._left.get(tactic))}
        known = {tactic: time_us for tactic, (taken, time_us) in stored.items() if taken == rounds}
        if any(tactic not in known and (tactic in stored or tactic not in self._failed) for tactic in batch.tactics):
            self._left.clear()
            return None
        for tactic in known:
            self._left[tactic].popleft()
        return known
