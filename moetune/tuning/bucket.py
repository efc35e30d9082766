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
from moetune.tuning.verdict import choice, decide

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Candidates, Problem
    from moetune.measure.bench import BenchLike
    from moetune.measure.compiling import Compilers
    from moetune.search.base import Batch, Search, Times
    from moetune.store.journal import Journaled

STARTS = 4
"""How many finalists of the bucket before start the search of the next."""
SEARCH_SHARE = 0.6
"""Of a bucket's share of the time budget, what its search may take; the final and its checks get the rest."""
FINAL_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket to be tuned: its row count `rows`, its typical rows, and the problem with all draws.

    `hints` and `failed` come from an interrupted run: the best tactics that it knew, and the tactics that failed, which
    are no candidates any more.
    """

    rows: int
    typical_rows: int
    candidates: Candidates
    default: Tactic
    problem: Problem
    hints: tuple[Tactic, ...] = ()
    failed: Mapping[Tactic, str] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: MoELayer, regime: Regime, backend: Backend, device: str, rows: int) -> Bucket:
        """Realizes all draws of one bucket, for the regime's rank."""
        from moetune.backends.base import Problem
        from moetune.workload.draws import bucket_draws, typical_rows

        typical = typical_rows(layer, regime, rows)
        draws = bucket_draws(layer, regime, rows, typical)
        kernel_rows = len(draws[0].routing.topk_ids)
        return cls(
            rows,
            typical,
            backend.candidates(layer, regime, kernel_rows, device),
            backend.default(layer, regime, rows),
            Problem(layer, regime, kernel_rows, regime.shard(layer), draws, device),
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
        """2 if the search's draws have two row counts (see `draws.sampled`), else 1."""
        return len({self.problem.draws[number].rows for number in self.problem.numbers("search")})

    def search(self, backend: Backend, strategy: Strategy, starts: Sequence[Tactic]) -> Search:
        """The backend's own search, or the exhaustive one where it has none or it is asked for.

        A search without starts looks wider than one with any, so hints alone never make it one with starts.
        """
        from moetune.backends.base import Searches

        if strategy == "auto" and isinstance(backend, Searches):
            starts = tuple(dict.fromkeys((*self.hints, *starts))) if starts else ()
            return backend.search(self.problem, self.candidates, starts)
        return exhaustive(self.candidates.tactics)


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
        draws = bucket.problem.draws
        played = final.play(bench, default, right, draws, self._final_s, most_s=most_s)
        verdict = decide(played, bench, draws, bucket.rows)
        return choice(
            played,
            verdict,
            bench,
            [draw.routing for draw in draws if draw.kind == "search"],
            rows=bucket.rows,
            typical_rows=bucket.typical_rows,
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
        draws = list(islice(cycle(problem.numbers("search")), rounds))
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
