"""`Prefetcher`: draws the buckets to come, and compiles their likeliest tactics, while a GPU measures one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from moetune.spec.tactic import Tactic
from moetune.store.journal import Journaled
from moetune.store.profile import Profile
from moetune.tuning.bucket import Bucket
from moetune.tuning.question import Question

if TYPE_CHECKING:
    from moetune.measure.compiling import Compilers

REALIZERS = 4
"""Number of threads that draw the routings of later buckets."""
COMPILED_FIRST = 32
"""Number of a bucket's likeliest tactics that are compiled before any other tactic."""
COMPILED_AHEAD = 128
"""Number of a bucket's likeliest tactics that are compiled in all before the bucket's turn.

Tactics that a running search is likely to propose next are compiled before these (see `Batch.likely_next`).
"""


class Prefetcher:
    """Makes the buckets of a tune; a context manager. On a GPU it makes later buckets while one is measured.

    Args:
        question: the question that is tuned.
        rows: the row counts of the buckets, in the order in which they are tuned.
        journaled: what an interrupted run has journaled.
        strategy: the search strategy, as the journal names it.
        compilers: compile tactics in processes of their own.
        start: an older profile whose tactics are checked instead of a search.
    """

    def __init__(
        self,
        question: Question,
        rows: Sequence[int],
        journaled: Journaled,
        strategy: str,
        compilers: Compilers,
        start: Profile | None = None,
    ) -> None:
        self.question, self._rows = question, rows
        self._journaled, self._strategy, self._compilers, self._start = journaled, strategy, compilers, start
        self._likely: dict[int, Sequence[Tactic]] = {}
        self._threads = ThreadPoolExecutor(REALIZERS, "moetune-realize")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what has not begun and waits for the threads."""
        self._threads.shutdown(cancel_futures=True)

    def buckets(self) -> Iterator[Bucket]:
        """Returns the buckets in turn. An error in making one is raised when it is its turn."""
        if not draws_ahead(self.question.device):
            return map(self.bucket, self._rows)
        _start_torchs_threads()
        drawn = deque(self._threads.submit(self.bucket, rows) for rows in self._rows)
        self._threads.submit(self._compile_more, tuple(drawn))
        return _results(drawn)

    def bucket(self, rows: int) -> Bucket:
        """Returns one bucket. If it has a search of its own, its likeliest tactics are compiled first."""
        layer, regime, backend = self.question.layer, self.question.regime, self.question.backend
        bucket = Bucket.of(layer, regime, backend, self.question.device, rows)
        bucket = replace(bucket, past=self._journaled.of(rows, bucket.default, self._strategy))
        if self._start is not None:
            bucket = bucket.starting_from(self._start, backend)
        elif not regime.ladder.is_searched(rows):
            return bucket
        entering = bucket.problem.rows
        likely = bucket.start.first if bucket.start else backend.likely(bucket.problem, bucket.candidates)
        likely = likely[:COMPILED_AHEAD]
        self._likely[entering] = likely
        self._compilers.request(layer, regime, entering, likely[:COMPILED_FIRST])
        return bucket

    def _compile_more(self, drawn: Sequence[Future[Bucket]]) -> None:
        wait(drawn)
        for entering, tactics in sorted(self._likely.items()):
            self._compilers.request(self.question.layer, self.question.regime, entering, tactics[COMPILED_FIRST:])


def draws_ahead(device: str) -> bool:
    """Returns whether later buckets are drawn while one is measured. On a CPU that would disturb the measurement."""
    return device.startswith("cuda")


def _start_torchs_threads() -> None:
    """Makes PyTorch create its pool of threads now, in the calling thread.

    In a process that was forked after its parent had set the number of threads, as vLLM's workers are, the first
    thread that runs an op creates the pool. If several do at once, some of them fail with "Invalid thread pool!".
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _results(drawn: deque[Future[Bucket]]) -> Iterator[Bucket]:
    """Yields the buckets in turn and keeps none that it has yielded, so that their memory is freed."""
    while drawn:
        yield drawn.popleft().result()
