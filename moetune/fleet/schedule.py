"""`Schedule` decides which fleet worker tunes which portion, and what is tried again elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from moetune.fleet.portions import Portion

TRIES = 3
"""How often a portion is tried whose workers are lost or fail."""


class Schedule:
    """The portions that wait, and those that workers tune. It measures nothing and waits for nothing."""

    def __init__(self) -> None:
        self._waiting: deque[Portion] = deque()
        self._able: dict[int, frozenset[int]] = {}
        self._busy: dict[int, Portion] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no worker tunes a portion."""
        return not self._busy

    @property
    def is_done(self) -> bool:
        """Whether no portion is left."""
        return not self._busy and not self._waiting

    def add(self, portions: Iterable[Portion]) -> None:
        """Adds portions behind those that wait."""
        self._waiting.extend(portions)

    def join(self, worker: int, questions: Iterable[int]) -> None:
        """Adds a worker that can answer these questions."""
        self._able[worker] = frozenset(questions)

    def assign(self) -> Iterator[tuple[int, Portion]]:
        """Yields each free worker with the first waiting portion that it can tune."""
        for worker in [each for each in self._able if each not in self._busy]:
            portion = next((each for each in self._waiting if self._takes(worker, each)), None)
            if portion is not None:
                self._waiting.remove(portion)
                self._busy[worker] = portion
                yield worker, portion

    def portion(self, worker: int) -> Portion:
        """Returns what a busy worker tunes."""
        return self._busy[worker]

    def is_busy(self, worker: int) -> bool:
        """Returns whether a worker tunes a portion."""
        return worker in self._busy

    def ended(self, worker: int) -> None:
        """Frees a worker whose portion is tuned."""
        del self._busy[worker]

    def failed(self, worker: int, left: Sequence[int]) -> bool:
        """Frees a worker that has failed to tune some buckets of its portion.

        Args:
            worker: the worker.
            left: the buckets that have no choice.

        Returns:
            Whether they are tried again, by a worker that has not failed with them.
        """
        again = self._again(worker, left)
        if again.tries >= TRIES or not self._untried(again):
            return False
        self._waiting.appendleft(again)
        return True

    def lost(self, worker: int, left: Sequence[int]) -> bool:
        """Removes a busy worker whose process or machine has ended; the arguments are those of `failed`.

        Returns:
            Whether the buckets are tried again, as soon as there is a worker.
        """
        self.leave(worker)
        again = self._again(worker, left)
        if again.tries >= TRIES:
            return False
        self._waiting.appendleft(again)
        return True

    def leave(self, worker: int) -> None:
        """Removes a worker."""
        self._able.pop(worker, None)

    def drop(self, number: int | None = None) -> list[Portion]:
        """Removes the waiting portions of a question, or of all of them, and returns them."""
        dropped = [each for each in self._waiting if number in (None, each.number)]
        self._waiting = deque(each for each in self._waiting if each not in dropped)
        return dropped

    def _takes(self, worker: int, portion: Portion) -> bool:
        """Returns whether a worker may tune a portion: one that it has tried only if there is no other worker."""
        if portion.number not in self._able[worker]:
            return False
        return worker not in portion.tried_by or not self._untried(portion)

    def _untried(self, portion: Portion) -> bool:
        """Returns whether there is a worker that can tune a portion and has not tried it."""
        return any(
            portion.number in questions and worker not in portion.tried_by for worker, questions in self._able.items()
        )

    def _again(self, worker: int, left: Sequence[int]) -> Portion:
        portion = self._busy.pop(worker)
        tried_by = portion.tried_by | {worker}
        return replace(portion, rows=tuple(left), tries=portion.tries + 1, tried_by=tried_by)
