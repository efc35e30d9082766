"""The one loop that joins workload → measurement → search → choice → store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.errors import MissError, NoResultError, UnsupportedError
from moetune.search.exhaustive import exhaustive
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.presets import layer as layer_of
from moetune.spec.regime import DISTRIBUTION_VARIABLE, Regime
from moetune.spec.tactic import Tactic
from moetune.stats import median, noise_floor, paired_ratio
from moetune.store.profile import Choice, Profile, Rejection
from moetune.store.store import Store

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Candidates
    from moetune.measure.bench import Bench
    from moetune.workload.routing import Routing

STRESS_FACTORS = (2, 3, 4)
"""A finalist is also timed with the busiest expert at these times its load."""
CLIFF = 2.0
"""A finalist slower than this times the default on a stress draw cannot win."""
FINAL_SECONDS = 4.0
"""About how long the interleaved final of one bucket may take."""
FINAL_SAMPLES = (20, 48)
"""The least and the most paired samples of a final."""
FINAL_TRIES = 3
"""How often a final is prolonged when too many of its rounds were disturbed."""
DISTURBED = 1.25
"""A round is disturbed where the default's two times differ by more than this factor."""


@dataclass(frozen=True, slots=True)
class Served:
    """The store had the whole answer; nothing was measured. `packaged`: it is one of those that come with moetune."""

    profile: Profile
    path: Path
    packaged: bool = False


@dataclass(frozen=True, slots=True)
class BucketStarted:
    """Bucket `index` of `count` begins: `tactics` candidates, the excluded ones with their reasons."""

    rows: int
    index: int
    count: int
    tactics: int
    excluded: Mapping[Tactic, str]


@dataclass(frozen=True, slots=True)
class TacticMeasured:
    """A tactic was timed for the first time in its bucket, or failed: then `time_us` is None and `reason` says why."""

    rows: int
    tactic: Tactic
    time_us: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BucketChosen:
    """Bucket `index` of `count` has its answer, and it is in the store."""

    choice: Choice
    index: int
    count: int


Event = Served | BucketStarted | TacticMeasured | BucketChosen
OnEvent = Callable[[Event], None]


def tune(
    layer: MoELayer | str,
    regime: Regime,
    backend: str | Backend = "torch",
    store: Store | Path | str | None = None,
    *,
    frozen: bool = False,
    again: bool = False,
    device: str | None = None,
    on_event: OnEvent | None = None,
) -> Profile:
    """Every bucket of the regime answered: from the store where it has the answer, else by measuring.

    Each bucket is saved as soon as it is known, so an interrupted run resumes.

    Args:
        layer: a layer, a preset's name, or a path to a Hugging Face config.json.
        regime: how one rank meets the layer. Where no distribution was given at its construction,
            `TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION` gives it.
        backend: the family of kernels, by name or as it was made by `registry.backend`.
        store: a store or its folder; `MOETUNE_STORE`, else the user's cache folder, by default.
        frozen: never measure.
        again: measure every bucket even where the store has it.
        device: a torch device; `cuda` where there is one, else `cpu`, by default.
        on_event: is told what happens, in order.

    Raises:
        UsageError: the regime does not fit the layer, an unknown name, or a store that cannot be written.
        UnsupportedError: the backend cannot run here, or does not compute this layer.
        MissError: `frozen`, and the store lacks the answer.
        NoResultError: the default tactic of a bucket failed or is wrong, so nothing can be compared with it.
    """
    tell = on_event or (lambda event: None)
    question = _Question.ask(layer, regime, backend, store, device)
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
    for index, rows in enumerate(missing):
        choice = _tune_bucket(question, rows, index, len(missing), tell)
        stored = question.store.save(question.profile(choice))
        tell(BucketChosen(choice, index, len(missing)))
    assert stored is not None
    return stored


def load(
    layer: MoELayer | str,
    regime: Regime,
    backend: str | Backend = "torch",
    store: Store | Path | str | None = None,
    *,
    device: str | None = None,
) -> Profile:
    """The stored profile of exactly this question, for this machine.

    Raises:
        MissError: there is none; it names every field in which the nearest stored profile differs.
    """
    return _Question.ask(layer, regime, backend, store, device).load()


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked, with every default resolved: the key of the answer."""

    layer: MoELayer
    regime: Regime
    backend: Backend
    environment: Environment
    store: Store
    device: str

    @classmethod
    def ask(
        cls,
        layer: MoELayer | str,
        regime: Regime,
        backend: str | Backend,
        store: Store | Path | str | None,
        device: str | None,
    ) -> _Question:
        from moetune.backends.registry import backend as backend_of
        from moetune.measure.probe import device_for, environment

        layer = layer if isinstance(layer, MoELayer) else layer_of(layer)
        regime = regime.with_default_distribution(os.environ.get(DISTRIBUTION_VARIABLE))
        regime.shard(layer)
        kernels = backend_of(backend) if isinstance(backend, str) else backend
        device = device_for(device)
        store = store if isinstance(store, Store) else Store(store)
        return cls(layer, regime, kernels, environment(kernels, device), store, device)

    def load(self) -> Profile:
        return self.store.load(self.layer, self.regime, self.backend.name, self.environment)

    def found(self) -> tuple[Path, Profile] | tuple[None, None]:
        try:
            return self.store.find(self.layer, self.regime, self.backend.name, self.environment)
        except MissError:
            return None, None

    def profile(self, choice: Choice) -> Profile:
        return Profile(
            layer=self.layer,
            regime=self.regime,
            backend=self.backend.name,
            environment=self.environment,
            choices=(choice,),
        )

    def require_support(self) -> None:
        if missing := self.backend.unavailable():
            raise UnsupportedError(f"Backend {self.backend.name} cannot run here: {missing[0]}", missing[1])
        if reason := self.backend.unsupported(self.layer, self.regime):
            raise UnsupportedError(f"Backend {self.backend.name} does not compute {self.layer.name}: {reason}")


def _has(profile: Profile | None, rows: int) -> bool:
    return profile is not None and any(choice.rows == rows for choice in profile.choices)


def _tune_bucket(question: _Question, rows: int, index: int, count: int, tell: OnEvent) -> Choice:
    """Searches one bucket, plays the final on draws that the search has not seen, and decides."""
    from moetune.backends.base import Problem
    from moetune.measure.bench import Bench
    from moetune.workload.routing import realize, stress

    layer, regime, backend = question.layer, question.regime, question.backend
    candidates = backend.candidates(layer, regime, rows, question.device)
    default = backend.default(layer, regime, rows)
    tell(BucketStarted(rows, index, count, len(candidates.tactics), candidates.excluded))

    seen = [realize(layer, regime, rows, draw=draw) for draw in range(regime.draws)]
    unseen = [realize(layer, regime, rows, draw=regime.draws + draw) for draw in range(regime.draws)]
    stressed = [stress(layer, regime, seen[0], 0, factor) for factor in STRESS_FACTORS]
    problem = Problem(layer, regime, rows, regime.shard(layer), (*seen, *unseen, *stressed), question.device)
    bench = Bench(backend, problem)

    finalists = _search(bench, rows, candidates, regime.draws, tell)
    if default in bench.failures:
        raise NoResultError(f"The default tactic {default} failed at {rows} rows: {bench.failures[default]}.")
    right = [tactic for tactic in finalists if tactic != default and bench.check(tactic, 0)]
    if not bench.check(default, 0):
        raise NoResultError(f"The default tactic {default} is wrong at {rows} rows: {bench.failures[default]}.")
    final = _Final.play(bench, default, right, range(regime.draws, 2 * regime.draws))
    stress_draws = {str(factor): 2 * regime.draws + at for at, factor in enumerate(STRESS_FACTORS)}
    return _decide(final, bench, candidates, stress_draws, rows, seen)


def _search(bench: Bench, rows: int, candidates: Candidates, draws: int, tell: OnEvent) -> tuple[Tactic, ...]:
    search = exhaustive(candidates.tactics)
    known: set[Tactic] = set()
    batch = next(search)
    while True:
        series = bench.samples(batch.tactics, _rotate(draws, batch.rounds))
        times = {t: sum(s) / len(s) for t, s in zip(batch.tactics, series, strict=True) if s is not None}
        _drop_wrong_leaders(bench, times)
        for tactic in batch.tactics:
            if tactic not in known:
                known.add(tactic)
                tell(TacticMeasured(rows, tactic, times.get(tactic), bench.failures.get(tactic, "")))
        try:
            batch = search.send(times)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def _drop_wrong_leaders(bench: Bench, times: dict[Tactic, float]) -> None:
    """Removes tactics from the front until the fastest is right, so that a wrong one never sets the pace."""
    while times and not bench.check(leader := min(times, key=lambda tactic: times[tactic]), 0):
        del times[leader]


@dataclass(frozen=True, slots=True)
class _Final:
    """Paired samples of the default, of the default again (A/A), and of every finalist."""

    default: Tactic
    default_us: tuple[float, ...]
    noise: float
    finalists: Mapping[Tactic, tuple[float, ...]]

    @classmethod
    def play(cls, bench: Bench, default: Tactic, finalists: Sequence[Tactic], draws: Sequence[int]) -> _Final:
        """Interleaves the default, the finalists and the default again, on `draws` in turn.

        A round in which the default took two different times says nothing about the others either: it is dropped for
        all alike, as long as enough rounds remain.
        """
        tactics = (default, *finalists, default)
        once = bench.samples(tactics, draws[:1])
        round_us = sum(series[0] for series in once if series)
        least, most = FINAL_SAMPLES
        rounds = min(most, max(least, int(FINAL_SECONDS * 1e6 / max(round_us, 1.0))))
        turns = cycle(draws)
        series: list[list[float]] = [[] for _ in tactics]
        for _ in range(FINAL_TRIES):
            for times, taken in zip(series, bench.samples(tactics, list(islice(turns, rounds))), strict=True):
                times.extend(taken or ())
            if default in bench.failures:
                raise NoResultError(f"The default tactic {default} failed in the final: {bench.failures[default]}.")
            pairs = enumerate(zip(series[0], series[-1], strict=True))
            quiet = [number for number, pair in pairs if max(pair) <= DISTURBED * min(pair)]
            if len(quiet) >= least:
                series = [[times[number] for number in quiet] if times else [] for times in series]
                break
        kept = {t: tuple(times) for t, times in zip(finalists, series[1:-1], strict=True) if t not in bench.failures}
        return cls(default, tuple(series[0]), noise_floor(series[0], series[-1]), kept)


def _decide(
    final: _Final,
    bench: Bench,
    candidates: Candidates,
    stress_draws: Mapping[str, int],
    rows: int,
    routings: Sequence[Routing],
) -> Choice:
    """The fastest finalist that beats the default beyond noise and falls off no cliff; else the default."""
    rejected = [Rejection(tactic=t, reason=reason) for t, reason in {**candidates.excluded, **bench.failures}.items()]
    winner, winner_us = final.default, final.default_us
    stress_us: dict[str, float] = {}
    default_stress_us: dict[str, float] = {}
    for tactic, series in sorted(final.finalists.items(), key=lambda item: sum(item[1])):
        ratio = paired_ratio(series, final.default_us)
        if ratio.high >= 1 - final.noise:
            break
        if median(series) >= median(final.default_us):
            continue  # its mean is better by a few disturbed rounds alone
        stress_us, default_stress_us = _stress(bench, tactic, final.default, stress_draws)
        cliff = next((f for f in stress_us if stress_us[f] > CLIFF * default_stress_us[f]), None)
        if cliff is None:
            winner, winner_us = tactic, series
            break
        slower = stress_us[cliff] / default_stress_us[cliff]
        reason = f"cliff: {slower:.1f} times the default's time with the busiest expert at {cliff} times its load"
        rejected.append(Rejection(tactic=tactic, reason=reason))
    if winner == final.default:
        stress_us = default_stress_us = _stress(bench, winner, winner, stress_draws)[0]
    gain = paired_ratio(final.default_us, winner_us)
    return Choice(
        rows=rows,
        tactic=winner,
        time_us=median(winner_us),
        default_tactic=final.default,
        default_time_us=median(final.default_us),
        gain=gain.value,
        gain_low=gain.low,
        gain_high=gain.high,
        noise=final.noise,
        stress_us=stress_us,
        default_stress_us=default_stress_us,
        tried=len(candidates.tactics),
        candidates=len(candidates.tactics) + len(candidates.excluded),
        rejected=tuple(rejected),
        load=tuple(int(slots) for slots in sum(routing.load for routing in routings)),  # type: ignore[union-attr]
        max_load=max(int(routing.load.max()) for routing in routings),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _stress(
    bench: Bench, tactic: Tactic, default: Tactic, stress_draws: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Median times in µs of a tactic and of the default on each stress draw, by its factor."""
    mine: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for factor, draw in stress_draws.items():
        for times, series in zip((mine, theirs), bench.samples((tactic, default), [draw] * 3), strict=True):
            times[factor] = median(series) if series else float("inf")
    return mine, theirs


def _rotate(draws: int, rounds: int) -> list[int]:
    return list(islice(cycle(range(draws)), rounds))
