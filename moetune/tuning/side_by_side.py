"""Times the choices of several backends side by side, in one process, on draws that no tune has used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from moetune.errors import NoResultError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.tuning.comparison import ComparedBucket
from moetune.tuning.events import BucketCompared, OnEvent
from moetune.tuning.final_comparison import FinalSamples, compare_finalists

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Problem
    from moetune.measure.bench import BenchLike
    from moetune.spec.tactic import Tactic

SECONDS = 0.5
"""About how long the rounds of one bucket may take."""


def from_profiles(profiles: Mapping[str, Profile]) -> list[ComparedBucket]:
    """Returns all buckets with the profiles' own times, which were not taken side by side.

    Args:
        profiles: the profiles by backend.
    """
    return [_not_interleaved(rows, times_us) for rows, times_us in _times_us(profiles).items()]


def interleaved(
    backends: Sequence[Backend],
    profiles: Mapping[str, Profile],
    device: str,
    isolate: bool,
    seconds: float,
    report: OnEvent,
) -> Iterator[ComparedBucket]:
    """Times the choices of all backends in the same rounds, and yields the buckets in ascending order.

    Args:
        backends: the backends that have a profile.
        profiles: the profiles by backend.
        device: a torch device.
        isolate: run kernels in a process of their own.
        seconds: about how long the rounds of one bucket may take.
        report: gets the events.
    """
    from moetune.measure.worker import open_benches
    from moetune.tuning.joined import JoinedBackend, joined

    tactics = {(name, choice.rows): joined(name, choice.tactic) for name, p in profiles.items() for choice in p.choices}
    layer, regime = next((profile.layer, profile.regime) for profile in profiles.values())
    by_rows = _times_us(profiles)
    with open_benches(JoinedBackend(backends), device, isolate) as bench_of:
        for index, (rows, times_us) in enumerate(by_rows.items()):
            report(BucketCompared(rows, index, len(by_rows)))
            named = {tactics[name, rows]: name for name in sorted(times_us, key=lambda name: times_us[name])}
            if len(named) == 1:
                yield _not_interleaved(rows, times_us)
                continue
            try:
                problem = _unseen(layer, regime, rows, device)
                yield _compared(bench_of(problem), named, range(len(problem.draws)), seconds, rows, times_us)
            except NoResultError as error:  # the process that holds all backends fails
                yield _not_interleaved(rows, times_us, dict.fromkeys(times_us, error.message))


def _unseen(layer: MoELayer, regime: Regime, rows: int, device: str) -> Problem:
    """Returns a bucket's problem on draws that no search and no final comparison has used."""
    from moetune.backends.base import Problem
    from moetune.workload.draws import side_by_side_draws

    draws = side_by_side_draws(layer, regime, rows)
    return Problem(layer, regime, len(draws[0].routing.topk_ids), regime.shard(layer), draws, device)


def _compared(
    bench: BenchLike,
    named: Mapping[Tactic, str],
    draws: Sequence[int],
    seconds: float,
    rows: int,
    times_us: dict[str, float],
) -> ComparedBucket:
    """Compares the tactics of a bucket.

    Args:
        bench: where they are timed, on `draws` by their numbers.
        named: the backend of each tactic, the fastest as tuned first.
        draws: the numbers of the bench's draws.
        seconds: about how long the rounds may take.
        rows: the bucket.
        times_us: the time of each backend's choice as it was tuned.
    """
    tactics = list(named)
    while len(tactics) > 1:
        leader, *others = tactics
        try:
            samples = compare_finalists(bench, leader, others, draws, rows, most_s=seconds)
        except NoResultError:
            if leader not in bench.failures:  # the process fails, whatever it runs
                raise
            tactics = [tactic for tactic in others if tactic not in bench.failures]
            continue
        if samples.finalists:
            return _decided(samples, bench, named)
        tactics = [leader]
    failed = {name: bench.failures[tactic] for tactic, name in named.items() if tactic in bench.failures}
    left = {name: time_us for name, time_us in times_us.items() if name not in failed}
    return _not_interleaved(rows, left or times_us, failed)


def _decided(samples: FinalSamples, bench: BenchLike, named: Mapping[Tactic, str]) -> ComparedBucket:
    series = samples.all_us
    winner, second, *_ = sorted(series, key=lambda tactic: (-len(series[tactic]), sum(series[tactic])))
    ratio = samples.ratio(second, winner)
    common = len(series[second])
    return ComparedBucket(
        rows=samples.rows,
        times_us={named[tactic]: fmean(times[:common]) for tactic, times in series.items()},
        winner=named[winner],
        runner_up=named[second],
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        noise=samples.noise,
        interleaved=True,
        decided=ratio.low > 1 + samples.noise,
        failed={named[tactic]: reason for tactic, reason in bench.failures.items() if tactic in named},
    )


def _not_interleaved(rows: int, times_us: dict[str, float], failed: Mapping[str, str] = {}) -> ComparedBucket:
    winner, *others = sorted(times_us, key=lambda name: times_us[name])
    return ComparedBucket(
        rows=rows,
        times_us=times_us,
        winner=winner,
        runner_up=others[0] if others else None,
        ratio=times_us[others[0]] / times_us[winner] if others else None,
        failed=dict(failed),
    )


def _times_us(profiles: Mapping[str, Profile]) -> dict[int, dict[str, float]]:
    """Returns by rows, ascending, and by backend the time of the choice as it was tuned."""
    buckets = sorted({choice.rows for profile in profiles.values() for choice in profile.choices})
    return {
        rows: {
            name: choice.time_us
            for name, profile in profiles.items()
            for choice in profile.choices
            if choice.rows == rows
        }
        for rows in buckets
    }
