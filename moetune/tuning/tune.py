"""Defines `tune`, which measures every bucket of a question and stores the choices, and `load`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.errors import MissError, MoetuneError
from moetune.measure.forked import working_torch
from moetune.measure.spares import Spares
from moetune.measure.throttling import Throttling, throttling
from moetune.spec.enums import Strategy
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning.early import start_early
from moetune.tuning.events import BucketChosen, OnEvent, Revalidated, Served, Throttled, TuneStarted
from moetune.tuning.question import Question, check_options
from moetune.tuning.refine import all_buckets, missing_buckets
from moetune.tuning.run import TuneRun
from moetune.tuning.saving import Notes, Saver

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.measure.worker import OpenBenches
    from moetune.spec.enums import RankWord


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
    open_benches: OpenBenches | None = None,
) -> Profile:
    """Returns the choices of all buckets of a regime: the stored ones, and measures those that are missing.

    Each bucket is saved as soon as it is decided, and the measurements of its search are journaled before that. So a
    run after an interrupted one goes on where that stopped: it measures again at most the tactics that were being timed
    then, or the final comparison that was being taken, and does not try again what failed.

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
        open_benches: opens the benches that take the times; by default `worker.open_benches`, with `isolate`.

    Raises:
        UsageError: the regime does not fit the layer, an unknown name, a value out of range, options that exclude each
            other, a `start` of another layer or backend, or a store that cannot be written.
        UnsupportedError: the backend cannot run here, or does not compute this layer; or torch does not work in this
            process, since it was forked from one that had already used it.
        MissError: `frozen`, and a choice is not stored; or `start` is `near`, and no profile is.
        NoResultError: the default tactic of a bucket failed or computes a wrong result, so nothing can be compared
            there; the other buckets are tuned and saved before. Or the worker's processes failed again and again.
        StoreError: the store's disk is full, or its lock is not free, before anything is measured.
        NotSavedError: the store could no longer be written when buckets were to be saved. The error has the profile.
    """
    report = on_event or (lambda event: None)
    check_options(frozen, again, time_budget_s, near, start is not None, strategy)
    with Spares() as spares:
        if not frozen:
            start_early(spares, layer, backend, store, device, isolate, surely=again or start is not None)
        question = Question.of(layer, regime, backend, store, device, rank, near)
        return _answered(
            question, report, spares,
            frozen=frozen, start=start, again=again, device=device,
            strategy=strategy, isolate=isolate, time_budget_s=time_budget_s, open_benches=open_benches,
        )  # fmt: skip


def _answered(
    question: Question,
    report: OnEvent,
    spares: Spares,
    *,
    frozen: bool,
    start: Profile | Path | str | None,
    again: bool,
    device: str | None,
    strategy: Strategy,
    isolate: bool,
    time_budget_s: float | None,
    open_benches: OpenBenches | None,
) -> Profile:
    """Returns what is stored, or measures what is missing. The arguments and errors are those of `tune`."""
    found = question.found(exact=again or start is not None)
    stored = found.profile if found else None
    if again:
        missing = all_buckets(question.regime, stored)
        found = stored = None
    else:
        missing = missing_buckets(stored.regime if stored else question.regime, stored)
    if found and not missing:
        if not frozen:
            with suppress(MoetuneError):  # a run that was killed after its last bucket has left it
                question.journal().remove()
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
    with working_torch(device):
        return _measured(
            question, missing, stored, older.profile if older else None, again, report, spares,
            strategy=strategy, isolate=isolate, time_budget_s=time_budget_s, open_benches=open_benches,
        )  # fmt: skip


def _measured(
    question: Question,
    missing: Sequence[int],
    stored: Profile | None,
    older: Profile | None,
    again: bool,
    report: OnEvent,
    spares: Spares,
    *,
    strategy: Strategy,
    isolate: bool,
    time_budget_s: float | None,
    open_benches: OpenBenches | None,
) -> Profile:
    """Measures the missing buckets and saves each. The arguments and errors are those of `tune`."""
    question.ensure_writable()
    journal = question.journal()
    if again:
        journal.remove()
    spares.start_for(question.backend, question.device, isolate)
    report(TuneStarted(question.backend.name, question.environment.device, len(missing)))
    run = TuneRun(
        question, missing, stored, older, Notes(journal, report), report,
        strategy=strategy, isolate=isolate, time_budget_s=time_budget_s, spares=spares, open_benches=open_benches,
    )  # fmt: skip
    saver = Saver(question, stored, again, report)
    before = throttling(question.device)
    with closing(run.choices()) as choices:
        try:
            for chosen in choices:
                saver.save(chosen.choice)
                report(BucketChosen(chosen.choice, chosen.index, chosen.count))
        except (KeyboardInterrupt, MoetuneError):
            saver.raise_unsaved()
            raise
    _report_throttling(question, before, report)
    stored = saver.finish()
    if not missing_buckets(question.regime, stored):
        with suppress(MoetuneError):  # what stays in the journal is of no use, and does no harm
            journal.remove()
    return stored


def _report_throttling(question: Question, before: Throttling, report: OnEvent) -> None:
    """Reports what has slowed the GPU down since `before`, if anything has."""
    if reasons := throttling(question.device).since(before):
        report(Throttled(question.backend.name, reasons))


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
