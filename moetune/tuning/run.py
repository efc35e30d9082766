"""Defines `TuneRun`, which measures the missing buckets of a question one after the other."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from moetune.errors import DefaultFailedError
from moetune.spec.enums import Strategy
from moetune.spec.tactic import Tactic
from moetune.store.journal import Journaled, Searched
from moetune.store.profile import Choice, Profile
from moetune.tuning.bucket import Bucket
from moetune.tuning.bucket_tuner import NUM_FINALISTS, BucketTuner
from moetune.tuning.events import (
    BucketFailed,
    BucketsSkipped,
    BucketStarted,
    DefaultDiffers,
    NoisyBucket,
    OnEvent,
    Resumed,
)
from moetune.tuning.prefetch import Prefetcher
from moetune.tuning.question import Question
from moetune.tuning.refine import further_bucket
from moetune.tuning.saving import Notes
from moetune.tuning.uninterrupted import uninterrupted
from moetune.tuning.verdict import NOISY

if TYPE_CHECKING:
    from moetune.backends.base import Problem
    from moetune.measure.bench import BenchLike
    from moetune.measure.compiling import Compilers
    from moetune.measure.spares import Spares
    from moetune.measure.worker import OpenBenches

NOISY_TRIES = 2
"""How often a bucket whose final comparison was too noisy is compared again."""
REVALIDATED_S = 0.2
"""About how long a bucket's final comparison may take if an older profile's tactics are checked.

The least number of samples is taken all the same. On the recorded tables they decide as well as five times as many: see
`search.revalidate`.
"""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice, which is number `index` of `count` so far."""

    choice: Choice
    index: int
    count: int


@dataclass(slots=True)
class _Noisy:
    """A bucket whose final comparison was too noisy to decide, the default that it chose so far, and the tries left."""

    tuner: BucketTuner
    finalists: Sequence[Tactic]
    chosen: Chosen
    tries: int = NOISY_TRIES

    def __post_init__(self) -> None:
        self.tuner.release()

    def compare_again(self, measured: Callable[[], None]) -> None:
        self.tries -= 1
        self.chosen = replace(self.chosen, choice=self.tuner.choose(self.finalists, measured))
        self.tuner.release()


class TuneRun:
    """Measures the missing buckets of a question, then those that the ladder adds, as long as the time lasts.

    Args:
        question: the question.
        missing: the buckets to measure.
        stored: the profile that has the other buckets, if there is one.
        start: an older profile whose tactics are checked instead of a search, or None.
        notes: gets the measurements of each search; those of an interrupted run are not taken again.
        report: gets the events.
        strategy: `auto` is the backend's own search; `exhaustive` times every tactic.
        isolate: run kernels in a process of their own.
        time_budget_s: about how long the run may take, or None.
        adds: also measure the buckets that the ladder `adaptive` adds.
        spares: processes that were started ahead, or None.
        open_benches: opens the benches; `worker.open_benches` if None.
    """

    def __init__(
        self,
        question: Question,
        missing: Sequence[int],
        stored: Profile | None,
        start: Profile | None,
        notes: Notes,
        report: OnEvent,
        *,
        strategy: Strategy,
        isolate: bool,
        time_budget_s: float | None,
        adds: bool = True,
        spares: Spares | None = None,
        open_benches: OpenBenches | None = None,
    ) -> None:
        self._open_benches = open_benches
        self._question, self._start, self._notes, self._report = question, start, notes, report
        self._strategy, self._isolate, self._adds, self._spares = strategy, isolate, adds, spares
        self._journaled_as = "revalidate" if start else str(strategy)
        self._has_budget = time_budget_s is not None
        self._end = time.monotonic() + (math.inf if time_budget_s is None else time_budget_s)
        self._order = sorted(missing, key=lambda rows: not question.regime.ladder.is_searched(rows))
        self._known = {choice.rows: choice for choice in stored.choices} if stored else {}
        self._fast: dict[int, Sequence[Tactic]] = {
            rows: (choice.tactic, *choice.equally_fast)[:NUM_FINALISTS] for rows, choice in self._known.items()
        }
        self._promising: Sequence[Tactic] = ()
        self._warned: set[str] = set()
        self._noisy: deque[_Noisy] = deque()
        self._failed: dict[int, DefaultFailedError] = {}
        self._held = ExitStack()

    def choices(self) -> Generator[Chosen]:
        """Yields the choice of each bucket once it is made.

        Buckets with a search of their own come first, because the others are tuned from their neighbors' fast tactics.
        Noisy buckets are compared again after the others, and before the ladder adds any.

        Raises:
            DefaultFailedError: after the last bucket, if a bucket has no choice because its default failed.
        """
        from moetune.measure.child import Child
        from moetune.measure.compiling import Compilers, capability_of
        from moetune.measure.worker import open_benches

        question, journaled = self._question, self._notes.journal.read()
        backend, device, child = question.backend, question.device, self._spares.child if self._spares else Child
        self._report_resumed(journaled)
        self._recall(journaled)
        with ExitStack() as stack:
            if self._open_benches is not None:
                opened = self._open_benches(backend, device, self._isolate)
            else:
                opened = open_benches(backend, device, self._isolate, child)
            bench_of = stack.enter_context(opened)
            compilers = stack.enter_context(Compilers(backend, capability_of(device), child=child))
            prefetcher = stack.enter_context(
                Prefetcher(question, self._order, journaled, self._journaled_as, compilers, self._start)
            )
            stack.callback(self._held.close)
            for index, bucket in enumerate(chain(prefetcher.buckets(), self._added(prefetcher))):
                if index and time.monotonic() >= self._end:
                    self._report(BucketsSkipped(tuple(self._order[index:]) or (bucket.rows,)))
                    break
                if chosen := self._attempted(bucket.rows, partial(self._chosen, bucket, index, bench_of, compilers)):
                    yield chosen
                self._held.close()
                if index + 1 >= len(self._order):  # before the ladder adds buckets by these choices
                    yield from self._compared_again()
            yield from self._compared_again()
        if self._failed:
            raise self._failure()

    def _hold_signals(self) -> None:
        """Defers signals until the bucket that is being decided is saved, or will be compared again.

        The caller of `choices` saves a choice before it asks for the next one.
        """
        self._held.enter_context(uninterrupted())

    def _attempted(self, rows: int, attempt: Callable[[], Chosen | None]) -> Chosen | None:
        """Returns the result for one bucket. If its default fails, that is reported, and the others go on."""
        try:
            return attempt()
        except DefaultFailedError as error:
            self._failed[rows] = error
            self._report(BucketFailed(rows, error.message))
            return None

    def _failure(self) -> DefaultFailedError:
        first, *others = self._failed.values()
        if not others:
            return first
        return DefaultFailedError(f"{first.message} Defaults failed in {len(others)} more buckets.", first.hint)

    def _chosen(
        self, bucket: Bucket, index: int, bench_of: Callable[[Problem], BenchLike], compilers: Compilers
    ) -> Chosen | None:
        """Tunes one bucket. Returns None if it is noisy and will be compared again."""
        left, count = max(len(self._order) - index, 1), max(len(self._order), index + 1)
        share_s = max(0.0, self._end - time.monotonic()) / left if self._has_budget else None
        note = partial(self._notes.note, bucket.rows, self._journaled_as)
        most_s = REVALIDATED_S if self._start else math.inf
        backend = self._question.backend
        tuner = BucketTuner(bucket, bench_of, compilers, share_s, self._report, note, backend.final_s, most_s)
        offered = bucket.candidates
        self._report(BucketStarted(bucket.rows, index, count, len(offered.tactics), offered.excluded))
        self._report_defaults(bucket)
        finalists = self._searched(bucket, tuner)
        chosen = Chosen(tuner.choose(finalists, self._hold_signals), index, count)
        self._known[bucket.rows] = chosen.choice
        if chosen.choice.noise <= NOISY:
            return chosen
        self._noisy.append(_Noisy(tuner, finalists, chosen))
        self._report(NoisyBucket(bucket.rows, chosen.choice.noise, NOISY_TRIES))
        return None

    def _searched(self, bucket: Bucket, tuner: BucketTuner) -> tuple[Tactic, ...]:
        """Searches one bucket, from the same warm starts as an interrupted run if there was one. Returns the finalists.

        What an interrupted run's search left to later ones stays as it was, if that had ended.
        """
        backend, search = self._question.backend, bucket.past.search
        if search is None:
            warm_starts = self._warm_starts(bucket.rows)
            search = Searched(rows=bucket.rows, strategy=self._journaled_as, warm_starts=warm_starts)
            self._notes.note_search(search)
        finalists = tuner.search(bucket.search(backend, self._strategy, search.warm_starts))
        if search.finalists is None:
            promising = tuple(backend.promising(tuner.times_us))
            self._fast[bucket.rows], self._promising = finalists, promising
            self._notes.note_search(search.model_copy(update={"finalists": finalists, "promising": promising}))
        return finalists

    def _recall(self, journaled: Journaled) -> None:
        """Takes over what an interrupted run's searches of the same strategy left to later ones, in their order."""
        for search in journaled.searches:
            if search.finalists is not None and search.strategy == self._journaled_as:
                self._fast.pop(search.rows, None)
                self._fast[search.rows], self._promising = search.finalists, search.promising

    def _compared_again(self) -> Generator[Chosen]:
        """Compares the finalists of noisy buckets again, each `NOISY_TRIES` times at most, and yields their choices.

        A bucket that stays noisy has its next turn after the others. When the time ends, the choices are as they are.
        """
        while self._noisy:
            bucket = self._noisy.popleft()
            if time.monotonic() < self._end:
                self._attempted(bucket.chosen.choice.rows, partial(bucket.compare_again, self._hold_signals))
            else:
                bucket.tries = 0
            choice = bucket.chosen.choice
            if choice.rows in self._failed:
                continue
            if choice.noise > NOISY:
                self._report(NoisyBucket(choice.rows, choice.noise, bucket.tries))
            if choice.noise > NOISY and bucket.tries:
                self._noisy.append(bucket)
            else:
                self._known[choice.rows] = choice
                yield bucket.chosen
            self._held.close()

    def _added(self, prefetcher: Prefetcher) -> Iterator[Bucket]:
        """Yields the buckets that the ladder `adaptive` adds, each once the choices before it are known."""
        if self._adds and self._question.regime.ladder.name == "adaptive":
            while rows := further_bucket([self._known[rows] for rows in sorted(self._known)]):
                if rows in self._failed:
                    return
                yield prefetcher.bucket(rows)

    def _warm_starts(self, rows: int) -> tuple[Tactic, ...]:
        """Returns the fast tactics of the nearest buckets, or of both neighbors if the bucket has no search."""
        if not self._question.regime.ladder.is_searched(rows):
            return neighbors_tactics(self._fast, rows)
        nearest = nearest_tactics(self._fast, rows)
        return (*nearest, *self._promising) if nearest else ()

    def _report_defaults(self, bucket: Bucket) -> None:
        """Reports each warning about a default once."""
        for warning in bucket.default_warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self._report(DefaultDiffers(bucket.rows, warning))

    def _report_resumed(self, journaled: Journaled) -> None:
        """Reports what an interrupted run has left, and drops what is not believed, so that it does not grow."""
        layer, regime, backend = self._question.layer, self._question.regime, self._question.backend
        defaults = {rows: backend.default(layer, regime, rows) for rows in sorted(self._order)}
        if doubted := [rows for rows, default in defaults.items() if journaled.is_doubted(rows, default)]:
            self._notes.drop(doubted)
        past = {rows: journaled.of(rows, default, self._journaled_as) for rows, default in defaults.items()}
        known = tuple(rows for rows, of_rows in past.items() if of_rows.times_us or of_rows.failed)
        if known or journaled.unread:
            failed = sum(len(of_rows.failed) for of_rows in past.values())
            timed = sum(len(of_rows.times_us) for of_rows in past.values())
            self._report(Resumed(known, failed, timed, journaled.unread))


def nearest_tactics(fast: Mapping[int, Sequence[Tactic]], rows: int) -> tuple[Tactic, ...]:
    """Returns the fast tactics of the other buckets, those of the bucket nearest to `rows` first."""
    nearest = sorted(fast, key=lambda other: abs(math.log(other / rows)))
    return tuple(dict.fromkeys(tactic for other in nearest for tactic in fast[other]))[:NUM_FINALISTS]


def neighbors_tactics(fast: Mapping[int, Sequence[Tactic]], rows: int) -> tuple[Tactic, ...]:
    """Returns the fast tactics of the next smaller and the next larger bucket."""
    below = max((other for other in fast if other < rows), default=None)
    above = min((other for other in fast if other > rows), default=None)
    neighbors = [other for other in (below, above) if other is not None]
    return tuple(dict.fromkeys(tactic for other in neighbors for tactic in fast[other][:NUM_FINALISTS]))
