"""`check`: measures whether the choices of a profile are still good on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moetune.errors import DefaultFailedError, NoResultError, UsageError
from moetune.quoting import enumerated, quoted
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile
from moetune.tuning.bucket import Bucket
from moetune.tuning.bucket_tuner import BucketTuner
from moetune.tuning.checked import Check, CheckedBucket, cliff_at, compared_rows, finding_of
from moetune.tuning.events import BucketChecked, BucketStarted, OnEvent
from moetune.tuning.run import NOISY_TRIES, nearest_tactics, neighbors_tactics
from moetune.tuning.verdict import decide

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Problem
    from moetune.measure.bench import BenchLike
    from moetune.measure.compiling import Compilers

WITHIN = 0.02
"""By how much a choice may be slower by default, relative."""
TRIES = 1 + NOISY_TRIES
"""How often a bucket is compared that is too noisy to decide."""


def check(
    profile: Profile,
    *,
    within: float = WITHIN,
    buckets: Sequence[int] = (),
    under: Sequence[str] = (),
    backend: Backend | None = None,
    device: str | None = None,
    isolate: bool = True,
    on_event: OnEvent | None = None,
) -> Check:
    """Compares the choices of a profile with the default and with what a new search finds, on this machine.

    Each bucket is searched anew, without the profile's tactics. Then choice, default and the search's finalists are
    timed in interleaved rounds at every row count that maps to the bucket, as in a tune. Nothing is stored.

    Args:
        profile: the profile.
        within: by how much a choice may be slower, relative.
        buckets: the buckets to check; all by default.
        under: distributions, such as `zipf:1`, under each of which alone the choices are compared too.
        backend: the backend; by default the profile's, with the options that its environment names.
        device: a torch device; by default the GPU if there is one, otherwise the CPU.
        isolate: run kernels in a process of their own.
        on_event: gets the events.

    Raises:
        UsageError: the profile is empty or was measured on another device, it lacks a bucket, or a distribution or
            `within` is out of range.
        UnsupportedError: the backend cannot run here.
        NoResultError: worker processes failed again and again, but not in a tactic.
    """
    from moetune.backends import registry
    from moetune.measure.compiling import Compilers, capability_of
    from moetune.measure.worker import open_benches
    from moetune.tuning.question import Question

    report = on_event or (lambda event: None)
    if not 0 <= within < math.inf:
        raise UsageError(f"--within must be 0 % or more, given {within:g}.")
    backend = backend or registry.of_environment(profile.backend, profile.environment.strict)
    question = Question.of(profile.layer, profile.regime, backend, None, device)
    question.require_support()
    if question.environment.device != profile.environment.device:
        raise UsageError(
            f"The profile was measured on {quoted(profile.environment.device)}; this machine has "
            f"{quoted(question.environment.device)}.",
            "Check it on a machine with that device, or tune here.",
        )
    choices = list(_chosen(profile, buckets))
    regimes = [profile.regime, *(_under(profile.regime, distribution) for distribution in under)]
    found: list[CheckedBucket] = []
    with (
        open_benches(backend, question.device, isolate) as bench_of,
        Compilers(backend, capability_of(question.device)) as compilers,
    ):
        for regime in regimes:
            checker = _Checker(profile.layer, regime, backend, question.device, within, bench_of, compilers, report)
            for choice in choices:
                found.append(checker.checked(choice, len(found), len(choices) * len(regimes)))
                report(BucketChecked(found[-1], len(found) - 1, len(choices) * len(regimes)))
    return Check(
        layer=profile.layer,
        regime=profile.regime,
        backend=profile.backend,
        measured=profile.environment,
        environment=question.environment,
        within=within,
        buckets=tuple(found),
    )


class _Checker:
    """Checks buckets under one distribution, one after the other. A search's finalists are warm starts of later ones.

    Args:
        layer: the profile's layer.
        regime: the profile's regime, perhaps with another distribution.
        backend: the profile's backend.
        device: the torch device.
        within: by how much a choice may be slower.
        bench_of: prepares a problem.
        compilers: compile tactics before they run.
        report: gets the events.
    """

    def __init__(
        self,
        layer: MoELayer,
        regime: Regime,
        backend: Backend,
        device: str,
        within: float,
        bench_of: Callable[[Problem], BenchLike],
        compilers: Compilers,
        report: OnEvent,
    ) -> None:
        self._layer, self._regime, self._backend, self._device = layer, regime, backend, device
        self._within, self._bench_of, self._compilers, self._report = within, bench_of, compilers, report
        self._fast: dict[int, Sequence[Tactic]] = {}

    def checked(self, choice: Choice, index: int, count: int) -> CheckedBucket:
        """Returns the finding on one choice, which is number `index` of `count`."""
        bucket = Bucket.of(self._layer, self._regime, self._backend, self._device, choice.rows)
        offered, tactic = bucket.candidates, choice.tactic
        self._report(BucketStarted(choice.rows, index, count, len(offered.tactics), offered.excluded))
        finding = partial(
            CheckedBucket,
            rows=choice.rows,
            distribution=self._regime.spelled_distributions,
            tactic=tactic,
            recorded_gain=choice.gain,
        )
        if tactic not in offered.tactics:
            return finding(finding="failed", reason=offered.excluded.get(tactic, "this device cannot run it"))
        try:
            return finding(**self._compared(bucket, tactic))
        except DefaultFailedError as error:  # the other buckets go on, as in a tune
            return finding(finding="failed", reason=error.message)

    def _compared(self, bucket: Bucket, tactic: Tactic) -> dict[str, Any]:
        """Returns the fields of the finding on `tactic`, which this device can run."""
        tuner = BucketTuner(
            bucket, self._bench_of, self._compilers, None, self._report, lambda *_: None, self._backend.final_s
        )
        finalists = tuner.search(bucket.search(self._backend, "auto", self._warm_starts(bucket.rows)))
        self._fast[bucket.rows] = finalists
        weights = [each.weight for each in bucket.row_counts]
        for _ in range(TRIES):
            compared = tuner.compare(tuple(dict.fromkeys((tactic, *finalists))), kept=tactic)
            if any(tactic not in samples.all_us for samples in compared.samples):
                reason = compared.rejected.get(tactic, "it did not run to the end")
                return {"finding": "failed", "reason": reason}
            verdict = decide(compared.samples, bucket.default, weights, compared.rejected, bucket.objective)
            rival = verdict.tactic
            by_rows, reverse = compared_rows(compared.samples, tactic, rival)
            found, reason = finding_of(by_rows, reverse, self._within)
            if found != "noisy":
                break
        steep = cliff_at(tactic, compared.stress_us, tuner.main_us)
        return {"by_rows": by_rows, "rival": rival, "cliff_at": steep, "finding": found, "reason": reason}

    def _warm_starts(self, rows: int) -> tuple[Tactic, ...]:
        if self._regime.ladder.is_searched(rows):
            return nearest_tactics(self._fast, rows)
        return neighbors_tactics(self._fast, rows)


def _under(regime: Regime, distribution: str) -> Regime:
    """Returns the regime with another distribution, and this one alone.

    Raises:
        UsageError: there is no such distribution, or its recording cannot be read.
    """
    from moetune.recordings.reading import with_digest  # imports torch

    given = {name: getattr(regime, name) for name in regime.model_fields_set - {"also", "objective"}}
    return with_digest(Regime(**{**given, "distribution": distribution}))


def _chosen(profile: Profile, buckets: Sequence[int]) -> Iterator[Choice]:
    """Yields the choices of these buckets, or of all.

    Raises:
        UsageError: the profile has no choice, or lacks a bucket.
    """
    known = {choice.rows: choice for choice in profile.choices}
    if not known:
        raise UsageError("The profile has no choice to check.", "Tune it first.")
    if lacking := [rows for rows in buckets if rows not in known]:
        raise UsageError(
            f"The profile has no bucket of {enumerated(lacking)} rows.", f"It has {enumerated(known, 64)}."
        )
    searched = profile.regime.ladder.is_searched
    for rows in sorted(buckets or known, key=lambda rows: not searched(rows)):  # as in a tune
        yield known[rows]


def undecided(found: Check) -> NoResultError | None:
    """Returns the error that says that a check could not decide, or None."""
    noisy = found.of("noisy")
    if not noisy:
        return None
    rows = enumerated(dict.fromkeys(bucket.rows for bucket in noisy))
    return NoResultError(
        f"The machine is too noisy to decide at {rows} rows.", "Check again when nothing else runs on it."
    )
