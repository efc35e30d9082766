"""The one loop that joins workload → measurement → search → choice → store."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
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
from moetune.tuning.bucket import STARTS, BucketTuner
from moetune.tuning.events import BucketChosen, BucketsSkipped, BucketStarted, OnEvent, Resumed, Served
from moetune.tuning.prefetch import Prefetcher
from moetune.tuning.question import Question, check_options

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.spec.enums import RankWord


def tune(
    layer: MoELayer | str,
    regime: Regime,
    backend: str | Backend = "auto",
    store: Store | Path | str | None = None,
    *,
    frozen: bool = False,
    again: bool = False,
    device: str | None = None,
    rank: RankWord | int | None = None,
    strategy: Strategy = "auto",
    isolate: bool = True,
    time_budget_s: float | None = None,
    on_event: OnEvent | None = None,
) -> Profile:
    """Every bucket of the regime answered: from the store where it has the answer, else by measuring.

    Each bucket is saved as soon as it is known, and what its search measures before that is journaled. So the run after
    an interrupted one goes on at the bucket where that stopped: it does not try again what failed there, and where the
    search is given starts, from buckets that are known, what was best there comes first.

    Args:
        layer: a layer, a preset's name, or a path to a Hugging Face config.json.
        regime: how one rank meets the layer. Where no distribution was given at its construction,
            `TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION` gives it.
        backend: the family of kernels, by name or as it was made by `registry.backend`; `auto` is the first that can
            run here and computes the layer. See `tune_all` for all of them.
        store: a store or its folder; `MOETUNE_STORE`, else the user's cache folder, by default.
        frozen: never measure.
        again: measure every bucket even where the store has it, and forget what an interrupted run knew.
        device: a torch device; `cuda` where there is one, else `cpu`, by default.
        rank: which one is measured, for all: `mean` has the load nearest the mean, `fullest` the most, or its number.
            By default the regime's where that was given one, else `mean`, and `fullest` where shards are uneven.
        strategy: `auto` is the backend's own search; `exhaustive` times every tactic, for ground truth.
        isolate: run kernels in a process of their own, which one that crashes or hangs takes down alone.
        time_budget_s: about how long it may take. Each bucket gets an equal share of what is left; buckets that have
            not begun by then are left for the next run, except the first.
        on_event: is told what happens, in order.

    Raises:
        UsageError: the regime does not fit the layer, an unknown name, a value out of range, `frozen` with `again`, or
            a store that cannot be written.
        UnsupportedError: the backend cannot run here, or does not compute this layer.
        MissError: `frozen`, and the store lacks the answer.
        NoResultError: the default tactic of a bucket failed or is wrong, so nothing can be compared with it.
    """
    tell = on_event or (lambda event: None)
    check_options(frozen, again, time_budget_s)
    question = Question.of(layer, regime, backend, store, device, rank)
    path, stored = (None, None) if again else question.found()
    missing = tuple(rows for rows in question.regime.buckets if again or not _has(stored, rows))
    if stored and path and not missing:
        tell(Served(stored, path, question.store.is_packaged(path)))
        return stored
    if frozen:
        if stored is None:
            question.load()  # its miss says what differs
        raise MissError(
            f"The stored profile lacks the buckets {', '.join(map(str, missing))}.",
            "Run the same command without --frozen.",
        )
    question.require_support()
    question.store.ensure_writable()
    journal = question.journal()
    if again:
        journal.remove()
    with closing(_choices(question, missing, strategy, isolate, time_budget_s, stored, journal, tell)) as choices:
        for choice in choices:
            stored = question.store.save(question.profile(choice))
            tell(BucketChosen(choice, missing.index(choice.rows), len(missing)))
    assert stored is not None
    if all(_has(stored, rows) for rows in question.regime.buckets):
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
) -> Profile:
    """The stored profile of exactly this question, for this machine; arguments are those of `tune`.

    Raises:
        MissError: there is none; it names every field in which the nearest stored profile differs.
    """
    return Question.of(layer, regime, backend, store, device, rank).load()


def _has(profile: Profile | None, rows: int) -> bool:
    return profile is not None and any(choice.rows == rows for choice in profile.choices)


def _choices(
    question: Question,
    missing: Sequence[int],
    strategy: Strategy,
    isolate: bool,
    time_budget_s: float | None,
    stored: Profile | None,
    journal: Journal,
    tell: OnEvent,
) -> Generator[Choice]:
    """The choice of one missing bucket after the other, as long as the time lasts."""
    from moetune.backends.base import PacesFinal, ReportsPromising
    from moetune.measure.compiling import Compilers, capability_of
    from moetune.measure.worker import open_benches

    end = time.monotonic() + time_budget_s if time_budget_s else None
    final_s = question.backend.final_s if isinstance(question.backend, PacesFinal) else None
    journaled = journal.read()
    layer, regime, backend = question.layer, question.regime, question.backend
    _tell_resumed(journaled, {rows: backend.default(layer, regime, rows) for rows in missing}, tell)
    with ExitStack() as stack:
        bench_of = stack.enter_context(open_benches(backend, question.device, isolate))
        compilers = stack.enter_context(Compilers(backend, capability_of(question.device)))

        buckets = stack.enter_context(Prefetcher(question, missing, journaled, compilers)).buckets()
        known = stored.choices if stored else ()
        good: dict[int, Sequence[Tactic]] = {choice.rows: [choice.tactic] for choice in known}
        promising: Sequence[Tactic] = ()
        for index, rows in enumerate(missing):
            if end and index and time.monotonic() >= end:
                tell(BucketsSkipped(tuple(missing[index:])))
                return
            bucket = next(buckets)
            offered, bench = bucket.candidates, bench_of(bucket.problem)
            tell(BucketStarted(rows, index, len(missing), len(offered.tactics), offered.excluded))
            starts = _starts(good, rows)
            search = bucket.search(backend, strategy, (*starts, *promising) if starts else ())
            share_s = max(0.0, end - time.monotonic()) / (len(missing) - index) if end else None
            note = partial(journal.note, rows, strategy)
            tuned = BucketTuner(bucket, bench, compilers, share_s, tell, note, final_s)
            good[rows] = tuned.search(search)
            promising = backend.promising(tuned.times_us) if isinstance(backend, ReportsPromising) else ()
            yield tuned.choose(good[rows])


def _starts(good: Mapping[int, Iterable[Tactic]], rows: int) -> tuple[Tactic, ...]:
    """What was good in the buckets nearest to one of `rows`, the nearest bucket's first."""
    nearest = sorted(good, key=lambda other: abs(math.log(other / rows)))
    return tuple(dict.fromkeys(tactic for other in nearest for tactic in good[other]))[:STARTS]


def _tell_resumed(journaled: Journaled, defaults: Mapping[int, Tactic], tell: OnEvent) -> None:
    past = {rows: journaled.of(rows, default) for rows, default in defaults.items()}
    known = tuple(rows for rows, of_rows in past.items() if of_rows.times_us or of_rows.failed)
    if known or journaled.unread:
        tell(Resumed(known, sum(len(of_rows.failed) for of_rows in past.values()), journaled.unread))
