"""Defines `tune`, which measures every bucket of a question and stores the choices, and `load`."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.errors import MissError
from moetune.spec.enums import Strategy
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.journal import Journal, Journaled
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store
from moetune.tuning.bucket import NUM_FINALISTS, Bucket, BucketTuner
from moetune.tuning.events import (
    BucketChosen,
    BucketsSkipped,
    BucketStarted,
    DefaultDiffers,
    NoisyBucket,
    OnEvent,
    Resumed,
    Revalidated,
    Served,
)
from moetune.tuning.prefetch import Prefetcher
from moetune.tuning.question import Question, check_options
from moetune.tuning.refine import all_buckets, further_bucket, missing_buckets
from moetune.tuning.verdict import NOISY

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.spec.enums import RankWord

NOISY_TRIES = 2
"""How often a bucket whose final comparison was too noisy is compared again."""
REVALIDATED_S = 0.5
"""About how long a bucket's final comparison may take if an older profile's tactics are checked."""


def tune(
    layer: MoELayer | str,
    regime: Regime,
    backend: str | Backend = "auto",
    store: Store | Path | str | None = None,
    *,
    frozen: bool = False,
    near: bool = False,
    start: Profile | Path | str | None = None,
    again: bool = False,
    device: str | None = None,
    rank: RankWord | int | None = None,
    strategy: Strategy = "auto",
    isolate: bool = True,
    time_budget_s: float | None = None,
    on_event: OnEvent | None = None,
) -> Profile:
    """Returns the choices of all buckets of a regime: the stored ones, and measures those that are missing.

    Each bucket is saved as soon as it is decided, and the measurements of its search are journaled before that. So a
    run after an interrupted one goes on at the bucket where that stopped. It does not try again what failed there, and
    times what was best there first, if other buckets already give its search warm starts.

    Args:
        layer: a layer, a preset's name, or a path to a Hugging Face config.json.
        regime: the deployment. If it was constructed without a distribution,
            `TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION` sets it.
        backend: the backend, by name or as returned by `registry.backend`; `auto` is the first that can run here and
            computes the layer. See `tune_all` for all of them.
        store: a store or its folder; by default `MOETUNE_STORE`, or the user's cache folder if that is not set.
        frozen: never measure.
        near: with `frozen`: if no stored profile matches, take the nearest one that differs in versions only.
        start: an older profile, its file, or `near`: the stored one that matches or differs in versions only. Each
            bucket times the tactics that it chose, their neighbors and the default, instead of a search. Only a profile
            of this very environment counts as stored.
        again: measure every bucket even if it is stored, replace what is stored for it, and forget the journal of an
            interrupted run.
        device: a torch device; by default `cuda` if there is one, else `cpu`.
        rank: the rank that is measured for all: `mean` has the load nearest the mean, `fullest` the most, or its
            number. By default the regime's own if it was given one, else `mean`, and `fullest` if shards are uneven.
        strategy: `auto` is the backend's own search; `exhaustive` times every tactic, for ground truth.
        isolate: run kernels in a process of their own, so that a crash or hang costs only that process.
        time_budget_s: about how long the tune may take. Each bucket gets an equal share of the time left; buckets that
            have not begun by then are left for the next run, except the first.
        on_event: is called with each event, in order.

    Raises:
        UsageError: the regime does not fit the layer, an unknown name, a value out of range, options that exclude each
            other, a `start` of another layer or backend, or a store that cannot be written.
        UnsupportedError: the backend cannot run here, or does not compute this layer.
        MissError: `frozen`, and a choice is not stored; or `start` is `near`, and no profile is.
        NoResultError: the default tactic of a bucket failed or computes a wrong result, so nothing can be compared.
    """
    report = on_event or (lambda event: None)
    check_options(frozen, again, time_budget_s, near, start is not None, strategy)
    question = Question.of(layer, regime, backend, store, device, rank, near)
    found = question.found(exact=again or start is not None)
    stored = found.profile if found else None
    if again:
        missing = all_buckets(question.regime, stored)
        found = stored = None
    else:
        missing = missing_buckets(stored.regime if stored else question.regime, stored)
    if found and not missing:
        packaged = question.store.is_packaged(found.path)
        report(Served(found.profile, found.path, packaged, found.differences))
        return found.profile
    if frozen:
        partial = question.load()  # if there is none, its error names the fields that differ
        lacking = ", ".join(map(str, missing_buckets(partial.regime, partial)))
        raise MissError(f"The stored profile lacks the buckets {lacking}.", "Run the same command without --frozen.")
    question.require_support()
    older = None if start is None else question.start(start)
    if older is not None:
        report(Revalidated(older.profile, older.differences))
    question.store.ensure_writable()
    journal = question.journal()
    if again:
        journal.remove()
    begun = older.profile if older else None
    with closing(
        _choices(question, missing, strategy, isolate, time_budget_s, stored, begun, journal, report)
    ) as choices:
        for chosen in choices:
            stored = question.store.save(question.profile(chosen.choice), replacing=again)
            report(BucketChosen(chosen.choice, chosen.index, chosen.count))
    assert stored is not None
    if not missing_buckets(question.regime, stored):
        journal.remove()
    return stored


def load(
    layer: MoELayer | str,
    regime: Regime,
    backend: str | Backend = "auto",
    store: Store | Path | str | None = None,
    *,
    device: str | None = None,
    rank: RankWord | int | None = None,
    near: bool = False,
) -> Profile:
    """Returns the stored profile of this question, for this machine.

    Args:
        layer, regime, backend, store, device, rank: as `tune`.
        near: if there is none, take the nearest profile that differs in versions only. Its `environment` says with
            which versions it was measured.

    Raises:
        MissError: there is none; the error names every field in which the nearest stored profile differs.
    """
    return Question.of(layer, regime, backend, store, device, rank, near).load()


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A choice, which is number `index` of `count` so far."""

    choice: Choice
    index: int
    count: int


def _choices(
    question: Question,
    missing: Sequence[int],
    strategy: Strategy,
    isolate: bool,
    time_budget_s: float | None,
    stored: Profile | None,
    start: Profile | None,
    journal: Journal,
    report: OnEvent,
) -> Generator[_Chosen]:
    """Yields the choice of each missing bucket in turn, then those that the ladder adds, as long as the time lasts.

    Buckets with a search of their own come first, because the others are tuned from their neighbors' fast tactics.
    Noisy buckets are compared again after the others, and before the ladder adds any.
    """
    from moetune.measure.compiling import Compilers, capability_of
    from moetune.measure.worker import open_benches

    end = time.monotonic() + time_budget_s if time_budget_s else math.inf
    journaled = journal.read()
    layer, regime, backend = question.layer, question.regime, question.backend
    _report_resumed(journaled, {rows: backend.default(layer, regime, rows) for rows in missing}, report)
    known = {choice.rows: choice for choice in stored.choices} if stored else {}
    fast: dict[int, Sequence[Tactic]] = {
        rows: (choice.tactic, *choice.equally_fast)[:NUM_FINALISTS] for rows, choice in known.items()
    }
    order = sorted(missing, key=lambda rows: not regime.ladder.is_searched(rows))
    promising: Sequence[Tactic] = ()
    warned: set[str] = set()
    with ExitStack() as stack:
        bench_of = stack.enter_context(open_benches(backend, question.device, isolate))
        compilers = stack.enter_context(Compilers(backend, capability_of(question.device)))
        noisy: deque[_Noisy] = deque()
        prefetcher = stack.enter_context(Prefetcher(question, order, journaled, compilers, start))
        buckets = chain(prefetcher.buckets(), _added(prefetcher, known))
        for index, bucket in enumerate(buckets):
            left = tuple(order[index:])
            if index and time.monotonic() >= end:
                report(BucketsSkipped(left or (bucket.rows,)))
                break
            share_s = max(0.0, end - time.monotonic()) / max(len(left), 1) if time_budget_s else None
            note = partial(journal.note, bucket.rows, "revalidate" if start else strategy)
            most_s = REVALIDATED_S if start else math.inf
            tuner = BucketTuner(bucket, bench_of, compilers, share_s, report, note, backend.final_s, most_s)
            offered, count = bucket.candidates, max(len(order), index + 1)
            report(BucketStarted(bucket.rows, index, count, len(offered.tactics), offered.excluded))
            _report_defaults(bucket, warned, report)
            if regime.ladder.is_searched(bucket.rows):
                warm_starts = _warm_starts(fast, bucket.rows)
                warm_starts = (*warm_starts, *promising) if warm_starts else ()
            else:
                warm_starts = _neighbors_tactics(fast, bucket.rows)
            fast[bucket.rows] = tuner.search(bucket.search(backend, strategy, warm_starts))
            promising = backend.promising(tuner.times_us)
            choice = known[bucket.rows] = tuner.choose(fast[bucket.rows])
            chosen = _Chosen(choice, index, count)
            if choice.noise > NOISY:
                noisy.append(_Noisy(tuner, fast[bucket.rows], chosen))
                report(NoisyBucket(bucket.rows, choice.noise, NOISY_TRIES))
            else:
                yield chosen
            if index + 1 >= len(order):  # before the ladder adds buckets by these choices
                yield from _compared_again(noisy, known, end, report)
        yield from _compared_again(noisy, known, end, report)


@dataclass(slots=True)
class _Noisy:
    """A bucket whose final comparison was too noisy to decide, the default that it chose so far, and the tries left."""

    tuner: BucketTuner
    finalists: Sequence[Tactic]
    chosen: _Chosen
    tries: int = NOISY_TRIES

    def __post_init__(self) -> None:
        self.tuner.release()

    def compare_again(self) -> None:
        self.tries -= 1
        self.chosen = replace(self.chosen, choice=self.tuner.choose(self.finalists))
        self.tuner.release()


def _compared_again(noisy: deque[_Noisy], known: dict[int, Choice], end: float, report: OnEvent) -> Generator[_Chosen]:
    """Compares the finalists of noisy buckets again, each `NOISY_TRIES` times at most, and yields their choices.

    A bucket that stays noisy has its next turn after the others. When the time ends, the choices are as they are.

    Args:
        noisy: the buckets; it is empty in the end.
        known: gets the choices, by rows.
        end: when the time ends, in s on the system's monotonic clock.
        report: gets the events.
    """
    while noisy:
        bucket = noisy.popleft()
        if time.monotonic() < end:
            bucket.compare_again()
        else:
            bucket.tries = 0
        choice = bucket.chosen.choice
        if choice.noise > NOISY:
            report(NoisyBucket(choice.rows, choice.noise, bucket.tries))
        if choice.noise > NOISY and bucket.tries:
            noisy.append(bucket)
        else:
            known[choice.rows] = choice
            yield bucket.chosen


def _added(prefetcher: Prefetcher, known: Mapping[int, Choice]) -> Iterator[Bucket]:
    """Yields the buckets that the ladder `adaptive` adds, each once the choices before it are in `known`."""
    if prefetcher.question.regime.ladder.name == "adaptive":
        while rows := further_bucket([known[rows] for rows in sorted(known)]):
            yield prefetcher.bucket(rows)


def _warm_starts(fast: Mapping[int, Sequence[Tactic]], rows: int) -> tuple[Tactic, ...]:
    """Returns the fast tactics of the other buckets, those of the bucket nearest to `rows` first."""
    nearest = sorted(fast, key=lambda other: abs(math.log(other / rows)))
    return tuple(dict.fromkeys(tactic for other in nearest for tactic in fast[other]))[:NUM_FINALISTS]


def _neighbors_tactics(fast: Mapping[int, Sequence[Tactic]], rows: int) -> tuple[Tactic, ...]:
    """Returns the fast tactics of the next smaller and the next larger bucket."""
    below = max((other for other in fast if other < rows), default=None)
    above = min((other for other in fast if other > rows), default=None)
    neighbors = [other for other in (below, above) if other is not None]
    return tuple(dict.fromkeys(tactic for other in neighbors for tactic in fast[other][:NUM_FINALISTS]))


def _report_defaults(bucket: Bucket, warned: set[str], report: OnEvent) -> None:
    """Reports the bucket's warnings that are not in `warned`, and adds them to it."""
    for warning in bucket.default_warnings:
        if warning not in warned:
            warned.add(warning)
            report(DefaultDiffers(bucket.rows, warning))


def _report_resumed(journaled: Journaled, defaults: Mapping[int, Tactic], report: OnEvent) -> None:
    past = {rows: journaled.of(rows, default) for rows, default in defaults.items()}
    known = tuple(rows for rows, of_rows in past.items() if of_rows.times_us or of_rows.failed)
    if known or journaled.unread:
        report(Resumed(known, sum(len(of_rows.failed) for of_rows in past.values()), journaled.unread))
