"""Which family of kernels is fastest, bucket by bucket: every one is tuned, then their choices meet side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from moetune.errors import MoetuneError, NoResultError, UnsupportedError
from moetune.inputs.engine_flags import engine_flags
from moetune.spec.enums import Strategy
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning import final_comparison as final
from moetune.tuning.comparison import ComparedBucket, Comparison, Family
from moetune.tuning.events import BucketCompared, Event, FamilyFailed, FamilyStarted, OnEvent, Served
from moetune.tuning.question import check_options, resolved
from moetune.tuning.verdict import common_ratio

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Problem
    from moetune.measure.bench import BenchLike
    from moetune.spec.tactic import Tactic
    from moetune.workload.draws import Draw

SECONDS = 0.5
"""About how long the final among the families may take in one bucket."""
TUNES_SHARE = 0.9
"""Of a time budget, what the families' tunes get; the finals among them get the rest."""
LEAST_S = 1e-3
"""A family whose turn comes after the budget has ended still gets this; its first bucket is measured in any case."""


def tune_all(
    layer: MoELayer | str,
    regime: Regime,
    store: Store | Path | str | None = None,
    *,
    frozen: bool = False,
    again: bool = False,
    device: str | None = None,
    strategy: Strategy = "auto",
    isolate: bool = True,
    time_budget_s: float | None = None,
    on_event: OnEvent | None = None,
) -> Comparison:
    """Tunes every family of kernels that can run here, each into its own profile, and compares them in every bucket.

    A family that fails costs only itself. Profiles are measured apart, so their choices are timed once more, side by
    side in one process, on draws that no search and no final has seen.

    Args:
        layer, regime, store, again, device, strategy, isolate, on_event: as `tune`.
        frozen: never measure: the stored profiles only, their times as they are.
        time_budget_s: about how long all of it may take.

    Raises:
        UsageError: as `tune`.
        UnsupportedError: no backend can run here and computes this layer.
        MissError: `frozen`, and the store has no family's whole answer.
        NoResultError: every family failed; what they had measured before is saved.
    """
    from moetune.backends.registry import able
    from moetune.measure.probe import device_for
    from moetune.tuning.tune import load, tune

    tell = on_event or (lambda event: None)
    check_options(frozen, again, time_budget_s)
    layer, regime = resolved(layer, regime)
    store = store if isinstance(store, Store) else Store(store)
    backends, left_out = able(layer, regime)
    if not backends:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UnsupportedError(
            f"No backend can tune {layer.name} here: {reasons}.",
            "Tune on a machine with the GPU that you deploy on; `moetune doctor` says what each backend needs.",
        )

    end = time.monotonic() + (math.inf if time_budget_s is None else time_budget_s)
    families: list[Family] = []
    errors: list[MoetuneError] = []
    for index, backend in enumerate(backends):
        tell(FamilyStarted(backend.name, index, len(backends)))
        share_s = time_budget_s
        if time_budget_s is not None and len(backends) > 1:
            left_s = end - time.monotonic() - (1 - TUNES_SHARE) * time_budget_s
            share_s = max(left_s / (len(backends) - index), LEAST_S)
        tuned = partial(
            tune, layer, regime, backend, store, frozen=frozen, again=again, device=device, strategy=strategy,
            isolate=isolate, time_budget_s=share_s,
        )  # fmt: skip
        stored = None if frozen else partial(load, layer, regime, backend, store, device=device)
        family, error = _family(backend, layer, tuned, stored, store, tell)
        families.append(family)
        if error:
            errors.append(error)
            if len(backends) > 1:  # else it is raised
                tell(FamilyFailed(backend.name, family.failed))

    if len(errors) == len(backends):
        raise _no_result(families, errors)
    profiles = {family.backend: family.profile for family in families if family.profile and family.profile.choices}
    regime = next(iter(profiles.values())).regime
    seconds = min(SECONDS, max(end - time.monotonic(), 0.0) / len(regime.buckets))
    if frozen or len(profiles) == 1:
        buckets = [_apart(rows, times_us) for rows, times_us in _times_us(profiles).items()]
    else:
        rivals = [backend for backend in backends if backend.name in profiles]
        buckets = list(_side_by_side(rivals, profiles, device_for(device), isolate, seconds, tell))
    return Comparison(
        layer=layer,
        regime=regime,
        device=next(iter(profiles.values())).environment.device,
        families=tuple(families),
        left_out=left_out,
        buckets=tuple(buckets),
    )


def _family(
    backend: Backend,
    layer: MoELayer,
    tuned: Callable[..., Profile],
    stored: Callable[[], Profile] | None,
    store: Store,
    tell: OnEvent,
) -> tuple[Family, MoetuneError | None]:
    """One backend tuned; where that fails, what it has nonetheless, and the error."""
    from moetune.measure.reasons import reason_of

    served: Served | None = None

    def listen(event: Event) -> None:
        nonlocal served
        served = event if isinstance(event, Served) else served
        tell(event)

    profile: Profile | None = None
    error: MoetuneError | None = None
    failed = ""
    try:
        profile = tuned(on_event=listen)
    except Exception as raised:  # a package of kernels may raise anything
        error = raised if isinstance(raised, MoetuneError) else NoResultError(f"{backend.name}: {reason_of(raised)}.")
        failed = error.message
        if stored is not None:
            with suppress(Exception):
                profile = stored()  # the buckets before it failed
    path = ""
    if profile is not None:
        question = (profile.layer, profile.regime, profile.backend, profile.environment)
        path = str(served.path if served else store.path(*question))
    return Family(
        backend=backend.name,
        profile=profile,
        path=path,
        served=served is not None,
        packaged=served is not None and served.packaged,
        failed=failed,
        flags=dict(engine_flags(backend.name, layer.precision)),
    ), error


def _no_result(families: Sequence[Family], errors: Sequence[MoetuneError]) -> MoetuneError:
    """What to raise where no family has a result: what all say, if they say one thing, else that none has one."""
    if len(errors) == 1 or (errors and len({error.exit_code for error in errors} | {NoResultError.exit_code}) == 2):
        return errors[0]
    reasons = "; ".join(f"{family.backend}: {family.failed}" for family in families)
    return NoResultError(f"No backend has a result: {reasons}", "`moetune doctor` says what can run here.")


def _apart(rows: int, times_us: dict[str, float], failed: Mapping[str, str] = {}) -> ComparedBucket:
    """A bucket by the profiles' own times, which were not taken side by side."""
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
    """By rows, ascending, and backend: the time of its choice as it was tuned."""
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


def _side_by_side(
    backends: Sequence[Backend],
    profiles: Mapping[str, Profile],
    device: str,
    isolate: bool,
    seconds: float,
    tell: OnEvent,
) -> Iterator[ComparedBucket]:
    """The buckets by a final among the families' choices."""
    from moetune.measure.worker import open_benches
    from moetune.tuning.joined import JoinedBackend, joined

    tactics = {(name, choice.rows): joined(name, choice.tactic) for name, p in profiles.items() for choice in p.choices}
    layer, regime = next((profile.layer, profile.regime) for profile in profiles.values())
    by_rows = _times_us(profiles)
    with open_benches(JoinedBackend(backends), device, isolate) as bench_of:
        for index, (rows, times_us) in enumerate(by_rows.items()):
            tell(BucketCompared(rows, index, len(by_rows)))
            rivals = {tactics[name, rows]: name for name in sorted(times_us, key=lambda name: times_us[name])}
            if len(rivals) == 1:
                yield _apart(rows, times_us)
                continue
            try:
                problem = _unseen(layer, regime, rows, device)
                yield _played(bench_of(problem), rivals, problem.draws, seconds, rows, times_us)
            except NoResultError as error:  # the process that was to hold all of them fails
                yield _apart(rows, times_us, dict.fromkeys(times_us, error.message))


def _unseen(layer: MoELayer, regime: Regime, rows: int, device: str) -> Problem:
    """A bucket on draws after those of the searches and the finals."""
    from moetune.backends.base import Problem
    from moetune.workload.draws import side_by_side_draws

    draws = side_by_side_draws(layer, regime, rows)
    return Problem(layer, regime, len(draws[0].routing.topk_ids), regime.shard(layer), draws, device)


def _played(
    bench: BenchLike,
    rivals: Mapping[Tactic, str],
    draws: Sequence[Draw],
    seconds: float,
    rows: int,
    times_us: dict[str, float],
) -> ComparedBucket:
    """The final among `rivals`, the fastest as tuned first."""
    players = list(rivals)
    while len(players) > 1:
        leader, *others = players
        try:
            played = final.play(bench, leader, others, draws, most_s=seconds, pooled=True)
        except NoResultError:
            if leader not in bench.failures:  # the process fails, whatever it runs
                raise
            players = [tactic for tactic in others if tactic not in bench.failures]
            continue
        if played.finalists:
            return _verdict(played, bench, rivals, rows)
        players = [leader]
    failed = {name: bench.failures[tactic] for tactic, name in rivals.items() if tactic in bench.failures}
    left = {name: time_us for name, time_us in times_us.items() if name not in failed}
    return _apart(rows, left or times_us, failed)


def _verdict(played: final.Final, bench: BenchLike, rivals: Mapping[Tactic, str], rows: int) -> ComparedBucket:
    series = {played.default: played.default_us, **played.finalists}
    winner, second, *_ = sorted(series, key=lambda tactic: (-len(series[tactic]), sum(series[tactic])))
    ratio = common_ratio(series[second], series[winner])
    common = len(series[second])
    return ComparedBucket(
        rows=rows,
        times_us={rivals[tactic]: fmean(times[:common]) for tactic, times in series.items()},
        winner=rivals[winner],
        runner_up=rivals[second],
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        noise=played.noise,
        interleaved=True,
        decided=ratio.low > 1 + played.noise,
        failed={rivals[tactic]: reason for tactic, reason in bench.failures.items() if tactic in rivals},
    )
