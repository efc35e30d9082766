"""`BucketTuner`: searches one bucket, compares its finalists, and decides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

from moetune.errors import DefaultFailedError
from moetune.measure.reasons import NOT_RUN
from moetune.measure.timeouts import slow_limit_us
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice
from moetune.tuning import final_comparison
from moetune.tuning.bucket import Bucket, RowCount
from moetune.tuning.events import OnEvent, SearchStopped, TacticMeasured
from moetune.tuning.final_comparison import FinalSamples, compare_right_ones
from moetune.tuning.objective import Scores
from moetune.tuning.replay import Replay
from moetune.tuning.verdict import StressTimes, choice, cliffs, decide, loss, stress_times

if TYPE_CHECKING:
    from moetune.backends.base import Problem
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
class Compared:
    """What the final comparisons of a bucket have measured.

    Attributes:
        samples: the samples at each of the bucket's row counts.
        stress_us: the times under stress.
        rejected: the tactics that cannot win, with the reasons.
    """

    samples: tuple[FinalSamples, ...]
    stress_us: StressTimes
    rejected: Mapping[Tactic, str]


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
        self._scores = Scores(bucket.objective)
        self._times: dict[Tactic, float] = {}
        self._tried: set[Tactic] = set()
        self._noted = set(self._failed)

    @property
    def times_us(self) -> Mapping[Tactic, float]:
        """The times in µs of all tactics that the search measured, see `Scores`."""
        return self._times

    @property
    def main_us(self) -> Mapping[Tactic, float]:
        """Their mean times in µs under the main distribution, which the stress draws have."""
        return self._scores.main_us(self._times)

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
                best = sorted(self._times, key=lambda tactic: self._times[tactic])[:NUM_FINALISTS]
                return self._scores.finalists(best, self._times)
            try:
                batch = search.send(times)
            except StopIteration as stop:
                return self._scores.finalists(stop.value, self._times)

    def choose(self, finalists: Sequence[Tactic], measured: Callable[[], None] = lambda: None) -> Choice:
        """Checks the finalists, compares them at every row count of the bucket, and decides.

        It can be called again if the noise was too large.

        Args:
            finalists: what `search` returned.
            measured: is called when nothing is left but to decide.

        Raises:
            DefaultFailedError: a default tactic failed or computes a wrong result.
        """
        bucket = self._bucket
        compared = self.compare(finalists)
        measured()
        weights = [count.weight for count in bucket.row_counts]
        verdict = decide(compared.samples, bucket.default, weights, {}, bucket.objective)
        return choice(
            compared.samples,
            verdict,
            self._bench,
            [draw.routing for draw in bucket.problem.draws if draw.kind == "search"],
            rows=bucket.rows,
            default=bucket.default,
            default_source=bucket.default_source,
            tried=len(self._tried),
            candidates=len(bucket.candidates.tactics) + len(bucket.candidates.excluded),
            stress_us=compared.stress_us,
            rejected=compared.rejected,
            objective=bucket.objective,
        )

    def compare(self, finalists: Sequence[Tactic], kept: Tactic | None = None) -> Compared:
        """Checks tactics, times them under stress, and compares them with the default at each row count of the bucket.

        A tactic that has a cliff, or is slower than the default at a row count, is not compared at the next ones of the
        same distribution. Under the next distribution it is, because slowdowns refer to the fastest tactic.

        Args:
            finalists: the tactics.
            kept: one of them that is compared at every row count all the same, as long as it computes right results.

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
        stress_us = stress_times(bench, right, default, bucket.problem.draws, self.main_us)
        (*_, stressed) = bucket.problem.numbers("stress")
        right = [tactic for tactic in right if bench.check(tactic, stressed)]
        steep = cliffs({tactic: stress_us[tactic] for tactic in (*right, default)}, default, self.main_us)
        rejected |= steep
        remaining = able = [tactic for tactic in dict.fromkeys(right) if tactic not in steep or tactic == kept]
        samples: list[FinalSamples] = []
        for count in bucket.row_counts:
            if samples and samples[-1].distribution != count.distribution:
                remaining = [tactic for tactic in able if tactic not in rejected]
            taken, wrong = self._compare(count, (default, *remaining))
            rejected |= wrong
            samples.append(taken)
            remaining = [
                tactic
                for tactic in taken.finalists
                if tactic in remaining and (tactic == kept or not loss(taken, tactic))
            ]
        return Compared(tuple(samples), stress_us, rejected)

    def _compare(self, count: RowCount, tactics: Sequence[Tactic]) -> tuple[FinalSamples, Mapping[Tactic, str]]:
        """Returns the samples at one row count, without the tactics that fail there, and these with the reasons."""
        is_search = count.problem is self._bucket.problem
        bench = self._bench if is_search else self._bench_of(count.problem)
        shares = len(self._bucket.row_counts)
        most_s = min(final_comparison.SECONDS, self._most_s)
        if self._share_s is not None:
            most_s = min(most_s, FINAL_SHARE * self._share_s)
        samples = compare_right_ones(
            bench,
            count.default,
            [tactic for tactic in tactics if tactic != count.default],
            count.draws,
            count.rows,
            seconds=None if self._final_s is None else self._final_s / shares,
            most_s=most_s / shares,
        )
        self._require_default(bench.failures, count.rows)
        return replace(samples, distribution=count.distribution), dict(bench.failures)

    def _require_default(self, failures: Mapping[Tactic, str], rows: int) -> None:
        default = self._bucket.default
        if default in failures:
            message = f"The default tactic {default} failed at {rows} rows: {failures[default]}."
            raise DefaultFailedError(message, self._bucket.default_hint)

    def _rounds(self, batch: Batch) -> int:
        """Returns how often each tactic of a batch is timed, at all row counts and distributions together."""
        return batch.rounds * self._bucket.rounds_of_all

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
        """Returns the times in µs of the tactics that ran, over the batch's rounds of each row count; see `Scores`.

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
            # without the default nothing could be decided, so it is never stopped
            limit_us = math.inf if self._bucket.default in compiled else slow_limit_us(self._times.values())
            series = self._bench.samples(compiled, draws, limit_us)
            samples = {tactic: taken for tactic, taken in zip(compiled, series, strict=True) if taken}
            times = self._scores.of(samples, [problem.draws[draw].distribution for draw in draws])
            while times and not self._bench.check(leader := min(times, key=lambda tactic: times[tactic]), 0):
                del times[leader]
        finally:  # an interrupt too leaves what is known
            failed = {tactic: reason for tactic, reason in self._failures.items() if tactic not in self._noted}
            self._noted.update(failed)
            # what was not run is tried again by the next tune
            lasting = {tactic: reason for tactic, reason in failed.items() if not reason.startswith(NOT_RUN)}
            # a score is no time that a later run could go on from
            self._note(rounds, {} if self._bucket.objective.is_several else times, lasting)
        self._report_tried(batch, times)
        return times
