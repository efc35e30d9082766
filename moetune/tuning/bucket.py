"""One bucket of a tune: its draws, its search, its final."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

from moetune.errors import NoResultError
from moetune.search.exhaustive import exhaustive
from moetune.spec.enums import Strategy
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice
from moetune.tuning import final_comparison as final
from moetune.tuning.events import OnEvent, SearchStopped, TacticMeasured
from moetune.tuning.verdict import STRESS_FACTORS, choice, decide

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Candidates, Problem
    from moetune.measure.bench import BenchLike
    from moetune.measure.compiling import Compilers
    from moetune.search.base import Batch, Search, Times
    from moetune.store.journal import Journaled
    from moetune.workload.routing import Routing

STARTS = 4
"""How many finalists of the bucket before start the search of the next."""
SEARCH_SHARE = 0.6
"""Of a bucket's share of the time budget, what its search may take; the final and its checks get the rest."""
FINAL_SHARE = 0.25
FINAL_ROWS, FINAL_EXPERTS = (4096, 65536), 512
"""A final's unseen draws have at least so many rows and so many local experts in all: the fewer there are in one draw,
the more it differs from the next. But they have no more rows than the second, which take long to draw …"""
FINAL_DRAWS = 4
"""… and are no more than this many times the search's; they are never fewer than those."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket to be tuned: `rows`, by which it is looked up, and a problem with its dummies (see `dummies`).

    The problem's draws: those of the search, the unseen ones of the final, the stressed ones. Of an interrupted run:
    `hints`, the best tactics that it knew, and `failed`, which are no candidates any more.
    """

    rows: int
    met_rows: int
    candidates: Candidates
    default: Tactic
    problem: Problem
    hints: tuple[Tactic, ...] = ()
    failed: Mapping[Tactic, str] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: MoELayer, regime: Regime, backend: Backend, device: str, rows: int) -> Bucket:
        """Realizes all draws of one bucket, for the regime's rank."""
        from moetune.backends.base import Problem
        from moetune.workload.dispatch import dummies, met_rows
        from moetune.workload.routing import stress

        shard, met = regime.shard(layer), met_rows(layer, regime, rows)
        count = regime.draws + num_unseen(regime.draws, rows, shard.num_local)
        draws = dummies(layer, regime, rows, met, range(count))
        stressed = [stress(layer, regime, draws[0], None, factor) for factor in STRESS_FACTORS]
        entering = len(draws[0].topk_ids)
        return cls(
            rows,
            met,
            backend.candidates(layer, regime, entering, device),
            backend.default(layer, regime, rows),
            Problem(layer, regime, entering, shard, (*draws, *stressed), device),
        )

    def resumed(self, journaled: Journaled) -> Bucket:
        """The bucket with what an interrupted run left of it."""
        past = journaled.of(self.rows, self.default)
        if not past.times_us and not past.failed:
            return self
        offered, excluded = self.candidates.tactics, self.candidates.excluded
        failed = {tactic: past.failed[tactic] for tactic in offered if tactic in past.failed}
        kept = tuple(tactic for tactic in offered if tactic not in failed)
        candidates = replace(self.candidates, tactics=kept, excluded={**excluded, **failed})
        return replace(self, candidates=candidates, hints=past.best(STARTS), failed=failed)

    @property
    def num_row_counts(self) -> int:
        """Of the draws: 2 where they alternate between the bucket's own rows and others that are met in it."""
        return 1 if self.met_rows == self.rows else 2

    @property
    def seen(self) -> Sequence[Routing]:
        """The draws of the search."""
        return self.problem.routings[: self.problem.regime.draws]

    @property
    def unseen_draws(self) -> range:
        """The numbers of the draws of the final."""
        return range(self.problem.regime.draws, len(self.problem.routings) - len(STRESS_FACTORS))

    @property
    def stress_draws(self) -> dict[str, int]:
        """The number of each stressed draw, by its factor."""
        first = self.unseen_draws.stop
        return {str(factor): first + at for at, factor in enumerate(STRESS_FACTORS)}

    def search(self, backend: Backend, strategy: Strategy, starts: Sequence[Tactic]) -> Search:
        """The backend's own search, or the exhaustive one where it has none or it is asked for.

        A search without starts looks wider than one with any, so hints alone never make it one with starts.
        """
        from moetune.backends.base import Searches

        if strategy == "auto" and isinstance(backend, Searches):
            starts = tuple(dict.fromkeys((*self.hints, *starts))) if starts else ()
            return backend.search(self.problem, self.candidates, starts)
        return exhaustive(self.candidates.tactics)


def num_unseen(draws: int, rows: int, num_local: int) -> int:
    """How many draws the final of a bucket has, where its search has `draws`."""
    least, most = (limit // rows for limit in FINAL_ROWS)
    return max(draws, min(max(least, FINAL_EXPERTS // num_local), most, FINAL_DRAWS * draws))


def untouched_draws(draws: int) -> range:
    """As many more draws as a search has, which neither a search nor a final has seen."""
    first = (1 + FINAL_DRAWS) * draws
    return range(first, first + draws)


class BucketTuner:
    """Searches one bucket, plays the final on draws that the search has not seen, and decides.

    Args:
        bucket: what is tuned.
        bench: where tactics are timed.
        compilers: which compile them first.
        share_s: the bucket's share of the time budget.
        tell: is told what happens.
        note: is given what each batch of the search brought: rounds, mean times in µs, and the reasons of failures.
        final_s: about how many seconds the final may take; `final.SECONDS` by default.
    """

    def __init__(
        self,
        bucket: Bucket,
        bench: BenchLike,
        compilers: Compilers,
        share_s: float | None,
        tell: OnEvent,
        note: Callable[[int, Times, Mapping[Tactic, str]], None],
        final_s: float | None = None,
    ) -> None:
        self._bucket, self._bench, self._compilers, self._tell = bucket, bench, compilers, tell
        self._note, self._final_s = note, final_s
        self._began, self._share_s = time.monotonic(), share_s
        self._uncompiled: dict[Tactic, str] = {}
        self._times: dict[Tactic, float] = {}
        self._tried: set[Tactic] = set()
        self._noted: set[Tactic] = set()

    @property
    def times_us(self) -> Mapping[Tactic, float]:
        """The mean times of all tactics that the search measured."""
        return self._times

    @property
    def _failures(self) -> Mapping[Tactic, str]:
        return {**self._uncompiled, **self._bench.failures}

    def search(self, search: Search) -> tuple[Tactic, ...]:
        """Measures what the search proposes; its finalists, or where the time ends the best so far."""
        batch = next(search)
        while True:
            times = self._measure(batch)
            self._times |= times
            if self._share_s is not None and time.monotonic() - self._began > SEARCH_SHARE * self._share_s:
                candidates = len(self._bucket.candidates.tactics)
                if len(self._tried) < candidates:
                    self._tell(SearchStopped(self._bucket.rows, len(self._tried), candidates))
                return tuple(sorted(self._times, key=lambda tactic: self._times[tactic])[:STARTS])
            try:
                batch = search.send(times)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]

    def choose(self, finalists: Sequence[Tactic]) -> Choice:
        """Checks the finalists, plays the final and decides."""
        bucket, bench, default = self._bucket, self._bench, self._bucket.default
        if default in self._failures:
            raise NoResultError(
                f"The default tactic {default} failed at {bucket.rows} rows: {self._failures[default]}."
            )
        right = [tactic for tactic in finalists if tactic != default and bench.check(tactic, 0)]
        if not bench.check(default, 0):
            raise NoResultError(
                f"The default tactic {default} is wrong at {bucket.rows} rows: {self._failures[default]}."
            )
        most_s = final.SECONDS if self._share_s is None else min(final.SECONDS, FINAL_SHARE * self._share_s)
        alternate = bucket.num_row_counts > 1
        played = final.play(
            bench, default, right, bucket.unseen_draws, self._final_s, most_s=most_s, alternate=alternate
        )
        verdict = decide(played, bench, bucket.stress_draws)
        return choice(
            played,
            verdict,
            bench,
            bucket.seen,
            rows=bucket.rows,
            met_rows=bucket.met_rows,
            tried=len(self._tried),
            candidates=len(bucket.candidates.tactics) + len(bucket.candidates.excluded),
            failed={**bucket.failed, **self._uncompiled},
        )

    def _measure(self, batch: Batch) -> dict[Tactic, float]:
        """Mean times in µs of those that ran, the batch's rounds of each row count; a wrong one never sets the pace."""
        tactics, rounds = batch.tactics, batch.rounds * self._bucket.num_row_counts
        rows, problem = self._bucket.rows, self._bucket.problem
        uncompiled = self._compilers.wait(problem.layer, problem.regime, problem.rows, tactics, batch.likely_next)
        uncompiled.pop(self._bucket.default, None)  # without it there is no result, so its first run has the last word
        self._uncompiled |= uncompiled
        compiled = [tactic for tactic in tactics if tactic not in self._uncompiled]
        draws = list(islice(cycle(range(problem.regime.draws)), rounds))
        times: dict[Tactic, float] = {}
        try:
            series = self._bench.samples(compiled, draws)
            times = {t: sum(samples) / len(samples) for t, samples in zip(compiled, series, strict=True) if samples}
            while times and not self._bench.check(leader := min(times, key=lambda tactic: times[tactic]), 0):
                del times[leader]
        finally:  # an interrupt too leaves what is known
            failed = {tactic: reason for tactic, reason in self._failures.items() if tactic not in self._noted}
            self._noted.update(failed)
            self._note(rounds, times, failed)
        for tactic in tactics:
            if tactic not in self._tried:
                self._tried.add(tactic)
                self._tell(TacticMeasured(rows, tactic, times.get(tactic), self._failures.get(tactic, "")))
        return times
