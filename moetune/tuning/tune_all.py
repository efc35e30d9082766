"""Defines `tune_all`, which tunes every backend that can run and compares their choices in every bucket."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.errors import MoetuneError, NoResultError, NotSavedError, UnsupportedError
from moetune.inputs.engine_flags import engine_flags
from moetune.spec.enums import Strategy
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.match import Match
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning import side_by_side
from moetune.tuning.comparison import BackendResult, Comparison
from moetune.tuning.events import BackendFailed, BackendStarted, Event, OnEvent, Served
from moetune.tuning.flag_answer import flag_answers
from moetune.tuning.question import check_options, resolved

if TYPE_CHECKING:
    from moetune.backends.base import Backend

HOPPER = "9.0"
"""The compute capability of H100 and H200."""
TUNES_SHARE = 0.9
"""The share of a time budget for the tunes of all backends; comparing them gets the rest."""
LEAST_S = 1e-3
"""The time budget of a backend that begins after the budget has ended. Its first bucket is measured in any case."""


def tune_all(
    layer: MoELayer | str,
    regime: Regime,
    store: Store | Path | str | None = None,
    *,
    frozen: bool = False,
    near: bool = False,
    again: bool = False,
    device: str | None = None,
    strategy: Strategy = "auto",
    isolate: bool = True,
    time_budget_s: float | None = None,
    on_event: OnEvent | None = None,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> Comparison:
    """Tunes every backend that can run here, each into a profile of its own, and compares them in every bucket.

    Rivals are among them: they have one tactic, which is timed. A backend that fails does not stop the others. Profiles
    are measured one after the other, so their choices are timed once more, side by side in one process, on draws that
    no tune has used.

    Args:
        layer, regime, store, near, again, device, strategy, isolate, on_event: as `tune`.
        frozen: never measure; the times are those of the stored profiles.
        time_budget_s: about how long all of it may take.
        options: options of single backends by name, such as `{"triton": {"remote": "zero"}}` for SGLang.

    Raises:
        UsageError: as `tune`, or a backend has no such option.
        UnsupportedError: no backend but rivals can run here and computes this layer.
        MissError: `frozen`, and no backend's whole profile is stored.
        NoResultError: every backend failed; the buckets before that are saved.
        NotSavedError: some profiles could not be saved. The error has the comparison, and the profiles in it.
    """
    from moetune.backends.registry import able, backend, backends_computing, preferred
    from moetune.measure.probe import device_for
    from moetune.tuning.tune import load, tune

    report = on_event or (lambda event: None)
    options = options or {}
    check_options(frozen, again, time_budget_s, near)
    layer, regime = resolved(layer, regime)
    store = store if isinstance(store, Store) else Store(store)
    backends, left_out = able(layer, regime, rivals=True)
    backends = [backend(each.name, **options[each.name]) if each.name in options else each for each in backends]
    if all(each.rival for each in backends):
        name = preferred(layer, regime).name
        if frozen and name in backends_computing(layer, regime):  # a miss says what the nearest profile is of
            load(layer, regime, backend(name, **options.get(name, {})), store, device=device)
        raise UnsupportedError(
            f"No backend can tune {layer.name} here. Backend {name}: {left_out[name]}.",
            "Tune on a machine with the GPU that you deploy on; `moetune doctor` says what each backend needs.",
        )

    budget = _Budget.of(time_budget_s)
    outcomes: list[_Outcome] = []
    for index, each in enumerate(backends):
        report(BackendStarted(each.name, index, len(backends)))
        tuned = partial(
            tune, layer, regime, each, store, frozen=frozen, near=near, again=again, device=device,
            strategy=strategy, isolate=isolate, time_budget_s=budget.of_tune(index, len(backends)),
        )  # fmt: skip
        stored = None if frozen else partial(load, layer, regime, each, store, device=device)
        outcome = _outcome(each, layer, regime, tuned, stored, store, report)
        outcomes.append(outcome)
        if outcome.error and len(backends) > 1:  # an only one is raised
            report(BackendFailed(each.name, str(outcome.error)))
    if all(outcome.error for outcome in outcomes):
        raise _no_result(outcomes)

    results = tuple(outcome.result for outcome in outcomes)
    profiles = {result.backend: result.profile for result in results if result.profile and result.profile.choices}
    first = next(iter(profiles.values()))
    if frozen or len(profiles) == 1:
        buckets = side_by_side.from_profiles(profiles)
    else:
        compared = [each for each in backends if each.name in profiles]
        seconds = budget.of_comparison(len(first.regime.buckets))
        buckets = list(side_by_side.interleaved(compared, profiles, device_for(device), isolate, seconds, report))
    hopper = first.environment.strict.get("compute_capability") == HOPPER
    comparison = Comparison(
        layer=layer,
        regime=first.regime,
        device=first.environment.device,
        families=results,
        left_out=left_out,
        buckets=tuple(buckets),
        answers=flag_answers(layer, first.regime, profiles, buckets, hopper),
    )
    if unsaved := [outcome.unsaved for outcome in outcomes if outcome.unsaved]:
        rows = {backend: rows for error in unsaved for backend, rows in error.rows.items()}
        raise NotSavedError(" ".join(error.message for error in unsaved), unsaved[0].hint, comparison, rows)
    return comparison


@dataclass(frozen=True, slots=True)
class _Budget:
    """The time budget of `tune_all`: `time_s` from its start until `end`; `time_s` is None if there is no limit."""

    time_s: float | None
    end: float

    @classmethod
    def of(cls, time_s: float | None) -> _Budget:
        return cls(time_s, time.monotonic() + (math.inf if time_s is None else time_s))

    def of_tune(self, index: int, count: int) -> float | None:
        """Returns the share of backend `index` of `count`: an equal part of what is left for all tunes."""
        if self.time_s is None or count == 1:
            return self.time_s
        left_s = self.end - time.monotonic() - (1 - TUNES_SHARE) * self.time_s
        return max(left_s / (count - index), LEAST_S)

    def of_comparison(self, buckets: int) -> float:
        """Returns the time to compare the backends in one of `buckets` buckets."""
        return min(side_by_side.SECONDS, max(self.end - time.monotonic(), 0.0) / buckets)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of one backend, the error that ended its tune, if one did, and what says that it is not saved."""

    result: BackendResult
    error: MoetuneError | None
    unsaved: NotSavedError | None = None


def _outcome(
    backend: Backend,
    layer: MoELayer,
    regime: Regime,
    tuned: Callable[..., Profile],
    stored: Callable[[], Profile] | None,
    store: Store,
    report: OnEvent,
) -> _Outcome:
    """Tunes one backend. If that fails, the result has the buckets that are stored all the same."""
    from moetune.measure.reasons import reason_of

    served: Served | None = None

    def listen(event: Event) -> None:
        nonlocal served
        served = event if isinstance(event, Served) else served
        report(event)

    profile: Profile | None = None
    error: MoetuneError | None = None
    unsaved: NotSavedError | None = None
    try:
        profile = tuned(on_event=listen)
    except NotSavedError as raised:
        unsaved, profile = raised, Profile.model_validate(raised.answer)
    except Exception as raised:  # a package of kernels may raise anything
        error = raised if isinstance(raised, MoetuneError) else NoResultError(f"{backend.name}: {reason_of(raised)}.")
        if stored is not None:
            with suppress(Exception):
                profile = stored()  # the buckets before it failed
    path = ""
    if profile is not None:
        question = (profile.layer, profile.regime, profile.backend, profile.environment)
        path = str(served.path if served else store.path(*question))
    match = Match(served.path, served.profile, served.differences) if served else None
    result = BackendResult(
        backend=backend.name,
        profile=profile,
        path=path,
        served=served is not None,
        packaged=served is not None and served.packaged,
        near=match.near if match else {},
        neutral=match.neutral if match else {},
        measured_ladder=match.measured_ladder if match else None,
        failed=error.message if error else "",
        flags=dict(engine_flags(backend.name, layer.precision, regime.layout)),
    )
    return _Outcome(result, error, unsaved)


def _no_result(outcomes: Sequence[_Outcome]) -> MoetuneError:
    """Returns the error if every backend failed: the first error if all exit codes agree, else a summary."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    codes = {error.exit_code for error in errors}
    if len(errors) == 1 or (len(codes) == 1 and codes != {NoResultError.exit_code}):
        return errors[0]
    reasons = "; ".join(f"{outcome.result.backend}: {outcome.result.failed}" for outcome in outcomes)
    return NoResultError(f"No backend has a result: {reasons}", "`moetune doctor` says what can run here.")
