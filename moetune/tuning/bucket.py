"""`Bucket`: the draws, candidates and defaults of one bucket that is to be tuned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moetune.search.exhaustive import exhaustive
from moetune.search.revalidate import OTHERS, first_tactics, revalidate
from moetune.spec.enums import Strategy
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.journal import Past
from moetune.store.profile import Profile
from moetune.tuning.objective import Objective
from moetune.tuning.verdict import UNLIKELY_WEIGHT

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Candidates, Problem
    from moetune.search.base import Search
    from moetune.workload.draws import Draw


@dataclass(frozen=True, slots=True)
class RowCount:
    """One row count at which a bucket's finalists are compared, under one distribution.

    Attributes:
        rows: the row count.
        default: what the engine would run with this many rows.
        weight: how much a slowdown at this row count matters.
        problem: the problem with draws of this row count.
        distribution: the distribution; empty if the regime has only one.
    """

    rows: int
    default: Tactic
    weight: float
    problem: Problem
    distribution: str = ""

    @property
    def draws(self) -> tuple[int, ...]:
        """Returns the positions of the problem's draws on which finalists are compared."""
        draws = self.problem.draws
        return tuple(at for at in self.problem.numbers("final") if draws[at].distribution == self.distribution)


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
        row_counts: the row counts at which finalists are compared, the most likely first; under several distributions
            all those of one, then those of the next.
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
        from moetune.workload.draws import compared_rows, final_draws, named_parts, search_draws

        shard, parts = regime.shard(layer), named_parts(regime)
        draws = search_draws(layer, regime, rows)
        kernel_rows = len(draws[0].routing.topk_ids)
        compared = {name: compared_rows(layer, part, rows) for name, part in parts.items()}
        final: dict[int, tuple[Draw, ...]] = {kernel_rows: draws}
        for name, counts in compared.items():
            for count in counts:
                taken = final_draws(layer, parts[name], count, len(counts) * len(parts), name)
                final[count] = (*final.get(count, ()), *taken)
        problems = {count: Problem(layer, regime, count, shard, of_rows, device) for count, of_rows in final.items()}
        defaults = {count: backend.explained_default(layer, regime, count) for count in (rows, *final)}
        default, problem = defaults[rows], problems[kernel_rows]
        row_counts = (
            RowCount(
                count,
                defaults[count].tactic,
                UNLIKELY_WEIGHT if count == rows != counts[0] else 1.0,
                problems[count],
                name,
            )
            for name, counts in compared.items()
            for count in counts
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
    def objective(self) -> Objective:
        """Returns what the choice minimizes over the regime's distributions."""
        return Objective.of(self.problem.regime)

    @property
    def rounds_of_all(self) -> int:
        """Returns how many of the search's draws in a row have every row count of every distribution.

        The draws of a distribution have its row counts in turn; see `draws.sampled`.
        """
        draws = [self.problem.draws[number] for number in self.problem.numbers("search")]
        rows: dict[str, set[int]] = {}
        for draw in draws:
            rows.setdefault(draw.distribution, set()).add(draw.rows)
        return len(rows) * max(map(len, rows.values()))

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
