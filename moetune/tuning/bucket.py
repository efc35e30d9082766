"""Tunes one bucket: its draws, its search, its final comparisons."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

from moetune.errors import DefaultFailedError
from moetune.search.exhaustive import exhaustive
from moetune.search.revalidate import OTHERS, first_tactics, revalidate
from moetune.spec.enums import Strategy
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.journal import Past
from moetune.store.profile import Choice, Profile
from moetune.tuning import final_comparison
from moetune.tuning.events import OnEvent, SearchStopped, TacticMeasured
from moetune.tuning.final_comparison import FinalSamples, compare_right_ones
from moetune.tuning.replay import Replay
from moetune.tuning.verdict import UNLIKELY_WEIGHT, choice, cliffs, decide, loss, stress_times

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Candidates, Problem
    from moetune.measure.bench import BenchLike
    from moetune.measure.compiling import Compilers
    from moetune.search.base import Batch, Search, Times

NUM_FINALISTS = 4
"""The most finalists of a bucket that are warm starts of the next one's search."""
SEARCH_SHARE = 0.6
"""The search's share of a bucket's time budget; the final comparisons and their checks get the rest."""
FINAL_SHARE = 0.25
"""The final comparisons' share of a bucket's time budget."""


@dataclass(frozen=True, slots=True)
class RowCount:
    """One row count at which a bucket's finalists are compared.

    Attributes:
        rows: the row count.
        default: what the engine would run with this many rows.
        weight: how much a slowdown at this row count matters.
        problem: the problem with draws of this row count.
    """

    rows: int
    default: Tactic
    weight: float
    problem: Problem


@dataclass(frozen=True, slots=True)
class Start:
    """What an older profile knew about one bucket.

    Attributes:
        winner: the tactic that it chose.
        others: the tactics that it chose for other buckets, those of the nearest bucket first.
        first: the candidates that are timed in any case.
    """

    winner: Tactic
    others: tuple[Tactic, ...]
    first: tuple[Tactic, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket to be tuned.

    Attributes:
        rows: the row count by which it is looked up.
        candidates: the tactics that may be timed.
        default: the default tactic at the bucket's own rows.
        problem: the problem with the draws of the search and of stress, and with those of the row count that has just
            as many rows, if there is one.
        row_counts: the row counts at which finalists are compared, the most likely first.
        past: what an interrupted run left. What failed in it is not tried again.
        default_source: where the default is from.
        default_warnings: a sentence for each default of a row count that is not what an engine runs.
        default_hint: what to do if the default fails.
        start: the tactics of an older profile that are checked instead of a search.
    """

    rows: int
    candidates: Candidates
    default: Tactic
    problem: Problem
    row_counts: tuple[RowCount, ...]
    past: Past = field(default_factory=Past)
    default_source: str = ""
    default_warnings: tuple[str, ...] = ()
    default_hint: str = ""
    start: Start | None = None

    @classmethod
    def of(cls, layer: MoELayer, regime: Regime, backend: Backend, device: str, rows: int) -> Bucket:
        """Samples all draws of one bucket, for the regime's rank."""
        from moetune.backends.base import Problem
        from moetune.workload.draws import compared_rows, final_draws, search_draws, typical_rows

        shard = regime.shard(layer)
        draws = search_draws(layer, regime, rows, typical_rows(layer, regime, rows))
        kernel_rows = len(draws[0].routing.topk_ids)
        compared = compared_rows(layer, regime, rows)
        final = {count: final_draws(layer, regime, count, len(compared)) for count in compared}
        problem = Problem(layer, regime, kernel_rows, shard, (*draws, *final.get(kernel_rows, ())), device)
        defaults = {count: backend.explained_default(layer, regime, count) for count in (rows, *compared)}
        default = defaults[rows]
        row_counts = (
            RowCount(
                count,
                defaults[count].tactic,
                UNLIKELY_WEIGHT if count == rows != compared[0] else 1.0,
                problem if count == kernel_rows else Problem(layer, regime, count, shard, final[count], device),
            )
            for count in compared
        )
        return cls(
            rows,
            _with_default(backend.candidates(layer, regime, kernel_rows, device), default.tactic),
            default.tactic,
            problem,
            tuple(row_counts),
            default_source=default.source,
            default_warnings=tuple(dict.fromkeys(each.warning for each in defaults.values() if each.warning)),
            default_hint=default.hint,
        )

    def starting_from(self, profile: Profile, backend: Backend) -> Bucket:
        """Returns the bucket with what an older profile knew about it, to check that instead of a search."""
        nearest = sorted(profile.choices, key=lambda choice: abs(math.log(choice.rows / self.rows)))
        winners = (nearest[0].tactic, *nearest[0].equally_fast)
        others = tuple(dict.fromkeys(choice.tactic for choice in nearest[1:] if choice.tactic not in winners))
        neighbors = backend.neighbors(self.candidates, winners[0], others)
        first = first_tactics(self.default, winners, others, neighbors, self.candidates.tactics)
        return replace(self, start=Start(winners[0], others, first))

    @property
    def num_search_row_counts(self) -> int:
        """2 if the search's draws have two row counts (see `draws.sampled`), else 1."""
        return len({self.problem.draws[number].rows for number in self.problem.numbers("search")})

    def search(self, backend: Backend, strategy: Strategy, warm_starts: Sequence[Tactic]) -> Search:
        """Returns the check of `start`, or else the backend's own search; the exhaustive one if `strategy` names it.

        A bucket that the ladder gives no search of its own times its warm starts alone.
        """
        if (start := self.start) is not None:
            more = [tactic for tactic in warm_starts if tactic in self.candidates.tactics and tactic not in start.first]
            others = tuple(dict.fromkeys((*warm_starts, *start.others)))
            return revalidate(
                (*start.first, *more[:OTHERS]),
                start.winner,
                lambda tactic: backend.neighbors(self.candidates, tactic, others),
            )
        if strategy == "exhaustive":
            return exhaustive(self.candidates.tactics)
        if warm_starts and not self.problem.regime.ladder.is_searched(self.rows):
            offered = dict.fromkeys((self.default, *warm_starts))
            return exhaustive([tactic for tactic in offered if tactic in self.candidates.tactics])
        return backend.search(self.problem, self.candidates, warm_starts)


def _with_default(candidates: Candidates, default: Tactic) -> Candidates:
    """Returns the candidates with the bucket's default, which can be another than that of the kernel's rows."""
    if default in candidates.tactics:
        return candidates
    excluded = {tactic: reason for tactic, reason in candidates.excluded.items() if tactic != default}
    return replace(candidates, tactics=(default, *candidates.tactics), excluded=excluded)


class BucketTuner:
    """Searches one bucket, compares its finalists on draws that the search has not used, and decides.

    Args:
        bucket: the bucket.
        bench_of: prepares a problem.
        compilers: compile tactics before they run.
        share_s: the bucket's share of the time budget.
        report: gets the events.
        note: gets the results of each batch of the search: rounds, mean times in µs, and the reasons of failures.
        final_s: about how many seconds the first rounds of the final comparisons may take; by default as many as all.
        most_s: about how many seconds the final comparisons may take, if that is less than `final_comparison.SECONDS`.
    """

    def __init__(
        self,
        bucket: Bucket,
        bench_of: Callable[[Problem], BenchLike],
        compilers: Compilers,
        share_s: float | None,
        report: OnEvent,
        note: Callable[[int, Times, Mapping[Tactic, str]], None],
        final_s: float | None = None,
        most_s: float = math.inf,
    ) -> None:
        self._bucket, self._bench_of, self._compilers, self._report = bucket, bench_of, compilers, report
        self._note, self._final_s, self._most_s = note, final_s, most_s
        self._began, self._share_s = time.monotonic(), share_s
        self._open_bench: BenchLike | None = bench_of(bucket.problem)
        self._replay = Replay(bucket.past)
        offered = set(bucket.candidates.tactics)
        self._failed = {tactic: reason for tactic, reason in bucket.past.failed.items() if tactic in offered}
        self._times: dict[Tactic, float] = {}
        self._tried: set[Tactic] = set()
        self._noted = set(self._failed)

    @property
    def times_us(self) -> Mapping[Tactic, float]:
        """The mean times of all tactics that the search measured."""
        return self._times

    def release(self) -> None:
        """Lets go of the problem's memory on the device until the next comparison. What failed is remembered."""
        self._failed |= self._bench.failures
        self._open_bench = None

    @property
    def _bench(self) -> BenchLike:
        if self._open_bench is None:
            self._open_bench = self._bench_of(self._bucket.problem)
        return self._open_bench

    @property
    def _failures(self) -> Mapping[Tactic, str]:
        return {**self._failed, **self._bench.failures}

    def search(self, search: Search) -> tuple[Tactic, ...]:
        """Measures what the search proposes, and answers what an interrupted run has measured.

        Returns:
            The search's finalists, or the best so far when the time ends.
        """
        batch = next(search)
        while True:
            times = self._replayed(batch)
            times = self._measure(batch) if times is None else times
            self._times |= times
            self._require_default(self._failures, self._bucket.rows)
            if self._share_s is not None and time.monotonic() - self._began > SEARCH_SHARE * self._share_s:
                candidates = len(self._bucket.candidates.tactics)
                if len(self._tried) < candidates:
                    self._report(SearchStopped(self._bucket.rows, len(self._tried), candidates))
                return tuple(sorted(self._times, key=lambda tactic: self._times[tactic])[:NUM_FINALISTS])
            try:
                batch = search.send(times)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]

    def choose(self, finalists: Sequence[Tactic], measured: Callable[[], None] = lambda: None) -> Choice:
        """Checks the finalists, compares them at every row count of the bucket, and decides.

        It can be called again if the noise was too large.

        Args:
            finalists: what `search` returned.
            measured: is called when nothing is left but to decide.

        Raises:
            DefaultFailedError: a default tactic failed or computes a wrong result.
        """
        bucket, bench, default = self._bucket, self._bench, self._bucket.default
        rejected = dict(self._failed)
        self._require_default(self._failures, bucket.rows)
        defaults = dict.fromkeys(count.default for count in bucket.row_counts)
        others = [tactic for tactic in (*finalists, *defaults) if tactic != default and tactic not in self._failed]
        right = [tactic for tactic in others if bench.check(tactic, 0)]
        bench.check(default, 0)
        self._require_default(self._failures, bucket.rows)
        stress_us = stress_times(bench, right, default, bucket.problem.draws, self._times)
        (*_, stressed) = bucket.problem.numbers("stress")
        right = [tactic for tactic in right if bench.check(tactic, stressed)]
        steep = cliffs({tactic: stress_us[tactic] for tactic in (*right, default)}, default, self._times)
        rejected |= steep
        remaining = [tactic for tactic in dict.fromkeys(right) if tactic not in steep]
        comparisons: list[FinalSamples] = []
        for count in bucket.row_counts:
            samples, wrong = self._compare(count, (default, *remaining))
            rejected |= wrong
            comparisons.append(samples)
            remaining = [tactic for tactic in samples.finalists if tactic in remaining and not loss(samples, tactic)]
        measured()
        verdict = decide(comparisons, default, [count.weight for count in bucket.row_counts])
        return choice(
            comparisons,
            verdict,
            bench,
            [draw.routing for draw in bucket.problem.draws if draw.kind == "search"],
            rows=bucket.rows,
            default=default,
            default_source=bucket.default_source,
            tried=len(self._tried),
            candidates=len(bucket.candidates.tactics) + len(bucket.candidates.excluded),
            stress_us=stress_us,
            rejected=rejected,
        )

    def _compare(self, count: RowCount, tactics: Sequence[Tactic]) -> tuple[FinalSamples, Mapping[Tactic, str]]:
        """Returns the samples at one row count, without the tactics that fail there, and these with the reasons."""
        is_search = count.problem is self._bucket.problem
        bench = self._bench if is_search else self._bench_of(count.problem)
        parts = len(self._bucket.row_counts)
        most_s = min(final_comparison.SECONDS, self._most_s)
        if self._share_s is not None:
            most_s = min(most_s, FINAL_SHARE * self._share_s)
        samples = compare_right_ones(
            bench,
            count.default,
            [tactic for tactic in tactics if tactic != count.default],
            count.problem.numbers("final"),
            count.rows,
            seconds=None if self._final_s is None else self._final_s / parts,
            most_s=most_s / parts,
        )
        self._require_default(bench.failures, count.rows)
        return samples, dict(bench.failures)

    def _require_default(self, failures: Mapping[Tactic, str], rows: int) -> None:
        default = self._bucket.default
        if default in failures:
            message = f"The default tactic {default} failed at {rows} rows: {failures[default]}."
            raise DefaultFailedError(message, self._bucket.default_hint)

    def _rounds(self, batch: Batch) -> int:
        """Returns how often each tactic of a batch is timed, at all row counts together."""
        return batch.rounds * self._bucket.num_search_row_counts

    def _replayed(self, batch: Batch) -> dict[Tactic, float] | None:
        """Returns the times in µs that an interrupted run took of a batch, or None if it must be measured."""
        times = self._replay.answer(batch, self._rounds(batch))
        if times is not None:
            self._report_tried(batch, times, known=True)
        return times

    def _report_tried(self, batch: Batch, times: Times, *, known: bool = False) -> None:
        """Reports the tactics of a batch that have not been reported yet."""
        for tactic in batch.tactics:
            if tactic not in self._tried:
                self._tried.add(tactic)
                reason, is_known = self._failures.get(tactic, ""), known or tactic in self._bucket.past.failed
                self._report(TacticMeasured(self._bucket.rows, tactic, times.get(tactic), reason, is_known))

    def _measure(self, batch: Batch) -> dict[Tactic, float]:
        """Returns the mean times in µs of the tactics that ran, over the batch's rounds of each row count.

        Whatever leads is checked, so that no tactic that computes a wrong result leads.
        """
        tactics, rounds, problem = batch.tactics, self._rounds(batch), self._bucket.problem
        uncompiled = self._compilers.wait(problem.layer, problem.regime, problem.rows, tactics, batch.likely_next)
        uncompiled.pop(self._bucket.default, None)  # there is no result without it, so its first run decides
        self._failed |= uncompiled
        compiled = [tactic for tactic in tactics if tactic not in self._failed]
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
        self._report_tried(batch, times)
        return times
