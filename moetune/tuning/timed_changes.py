"""Times the tactics in which two profiles differ, on draws that no tune has used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from moetune.errors import DefaultFailedError, UnsupportedError, UsageError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile
from moetune.store.versions import KERNEL_FIELDS, versions_of
from moetune.tuning.changes import ChangedBucket, Changes, TimedRows
from moetune.tuning.final_comparison import FinalSamples, compare_right_ones

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Problem
    from moetune.measure.bench import BenchLike

SECONDS = 1.0
"""About how long the rounds of one bucket may take, at all its row counts together."""


def require_measurable(changes: Changes, a: Profile, b: Profile, backend: Backend, device: str) -> None:
    """Checks that the tactics of both profiles run here as they were measured.

    Args:
        changes: what differs between the profiles.
        a, b: the profiles.
        backend: the backend that would time them.
        device: the torch device.

    Raises:
        UsageError: a bucket has another load in B than in A, or the profiles are of different kernels or devices.
        UnsupportedError: this machine has another device, or versions in which a tactic means something else, or the
            backend cannot run here.
    """
    from moetune.measure.probe import environment

    of_kernel = KERNEL_FIELDS | {"backend", "device"}
    if not changes.same_load or (others := sorted(changes.differing.keys() & of_kernel)):
        what = "deployments" if not changes.same_load else " and ".join(others)
        raise UsageError(
            f"--measure times tactics under one load: the profiles differ in their {what}.",
            "Leave --measure out to compare the records.",
        )
    if missing := backend.unavailable():
        raise UnsupportedError(f"Backend {backend.name} cannot run here: {missing[0]}.", missing[1])
    here = environment(backend, device)
    for name, profile in (("A", a), ("B", b)):
        differing = here.differing(profile.environment)
        if not versions_of(profile.backend).are_near(frozenset(differing)):
            shown = ", ".join(f"{field} {theirs} (here {mine})" for field, (mine, theirs) in differing.items())
            raise UnsupportedError(
                f"--measure: profile {name} was measured with {shown}.",
                "Run it on a machine with the device and the versions of the profiles, or leave --measure out.",
            )


def timed(
    changes: Changes,
    profile: Profile,
    backend: Backend,
    device: str,
    *,
    isolate: bool = True,
    on_bucket: Callable[[int, int, int], None] = lambda rows, index, count: None,
) -> Changes:
    """Returns the changes with times of both tactics of each bucket that differs, at each row count of the bucket.

    Args:
        changes: what differs between the profiles; see `require_measurable`.
        profile: either of the profiles, for layer and regime.
        backend: the backend that runs the tactics.
        device: the torch device.
        isolate: run kernels in a process of their own.
        on_bucket: is called with the rows, the number and the count of the buckets before each is timed.
    """
    from moetune.measure.probe import environment
    from moetune.measure.worker import open_benches

    others = [bucket for bucket in changes.buckets if bucket.state == "other"]
    found: dict[int, ChangedBucket] = {}
    with open_benches(backend, device, isolate) as bench_of:
        for index, bucket in enumerate(others):
            on_bucket(bucket.rows, index, len(others))
            found[bucket.rows] = _timed_bucket(bucket, profile, device, bench_of)
    buckets = tuple(found.get(bucket.rows, bucket) for bucket in changes.buckets)
    return changes.model_copy(update={"buckets": buckets, "measured_on": environment(backend, device).device})


def _timed_bucket(
    bucket: ChangedBucket, profile: Profile, device: str, bench_of: Callable[[Problem], BenchLike]
) -> ChangedBucket:
    from moetune.workload.draws import compared_rows, named_parts

    assert bucket.tactic_a is not None
    assert bucket.tactic_b is not None
    parts = named_parts(profile.regime)
    places = sorted(
        (count, name) for name, part in parts.items() for count in compared_rows(profile.layer, part, bucket.rows)
    )
    rows: list[TimedRows] = []
    for count, name in places:
        problem = _problem(profile.layer, parts[name], count, device)
        bench = bench_of(problem)
        try:
            samples = compare_right_ones(
                bench, bucket.tactic_a, [bucket.tactic_b], problem.numbers("final"), count,
                most_s=SECONDS / len(places),
            )  # fmt: skip
        except DefaultFailedError:  # A's tactic, which takes the default's place
            return bucket.model_copy(update={"timed": tuple(rows), "failed": _failed(bucket, bench)})
        if bucket.tactic_b in bench.failures:
            return bucket.model_copy(update={"timed": tuple(rows), "failed": _failed(bucket, bench)})
        rows.append(_rows(replace(samples, distribution=name), bucket.tactic_a, bucket.tactic_b))
    return bucket.model_copy(update={"timed": tuple(rows)})


def _problem(layer: MoELayer, regime: Regime, rows: int, device: str) -> Problem:
    """Returns the problem of one row count, on draws that no search and no final comparison has used.

    The regime has one distribution.
    """
    from moetune.backends.base import Problem
    from moetune.workload.draws import as_draws, untouched
    from moetune.workload.routing import realize

    draws = as_draws((realize(layer, regime, rows, None, number) for number in untouched(regime.draws)), "final")
    return Problem(layer, regime, rows, regime.shard(layer), draws, device)


def _failed(bucket: ChangedBucket, bench: BenchLike) -> dict[Literal["a", "b"], str]:
    """Returns why the tactics of A and B failed on a bench."""
    tactics: dict[Literal["a", "b"], Tactic | None] = {"a": bucket.tactic_a, "b": bucket.tactic_b}
    return {name: bench.failures[tactic] for name, tactic in tactics.items() if tactic and tactic in bench.failures}


def _rows(samples: FinalSamples, a: Tactic, b: Tactic) -> TimedRows:
    ratio = samples.ratio(b, a)
    times_a, times_b = (samples.counted(samples.all_us[tactic]) for tactic in (a, b))
    slower, faster = ratio.low > 1 + samples.noise, ratio.high < 1 / (1 + samples.noise)
    return TimedRows(
        rows=samples.rows,
        distribution=samples.distribution,
        time_a_us=fmean(times_a),
        time_b_us=fmean(times_b),
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        noise=samples.noise,
        faster="a" if slower else "b" if faster else None,
    )
