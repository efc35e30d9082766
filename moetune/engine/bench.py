"""The engine's own op as a bench: a final of FlashInfer's fastest tactics against its default is played on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from moetune.engine.agree import gather
from moetune.final import decide, play
from moetune.spec.tactic import Tactic
from moetune.stats import median
from moetune.store.profile import Choice, Rejection

if TYPE_CHECKING:
    from moetune.measure.clock import Call, Clock
    from moetune.workload.routing import Routing

MARGIN = 0.03
"""How much faster than the default a tactic must be, however quiet the machine (flashinfer #3537 asks for as much)."""
SECONDS = 1.0
"""About how long one final may take."""

Series = list[tuple[float, ...] | None]


class EngineBench:
    """`BenchLike` over calls of the engine's op. Its times are the mean over the ranks of `group`, so all decide alike.

    Args:
        calls: what runs a tactic on the draw of a number.
        clock: how time is taken.
        group: ranks that time the same tactics in the same order, or None.

    Attributes:
        failures: the tactics that did not run on some rank.
    """

    def __init__(self, calls: Mapping[Tactic, Call], clock: Clock, group: Any = None) -> None:
        self.failures: dict[Tactic, str] = {}
        self._calls, self._clock, self._group = calls, clock, group
        self._warm: set[Tactic] = set()

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> Series:
        """See `Bench.samples`. A collective: every rank of the group must call it."""
        try:
            mine = self._samples(tactics, draws)
        except Exception as error:  # whatever a kernel raises, the other ranks wait for this one's times
            mine = [None] * len(tactics)
            self.failures.update((tactic, f"{type(error).__name__}: {error}") for tactic in tactics)
        pooled = mean_of_ranks(gather(mine, self._group))
        for tactic, series in zip(tactics, pooled, strict=True):
            if series is None:
                self.failures.setdefault(tactic, "failed on another rank")
        return pooled

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Whether it ran; inside an engine there is no reference to compare with."""
        return tactic not in self.failures

    def _samples(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> Series:
        for tactic in {*tactics} - self._warm - self.failures.keys():
            try:
                self._clock.warm_up(self._calls[tactic], draws[0])
                self._warm.add(tactic)
            except Exception as error:  # a kernel may raise anything
                self.failures[tactic] = f"{type(error).__name__}: {error}"
        running = [tactic for tactic in tactics if tactic not in self.failures]
        series = iter(self._clock.paired_samples([self._calls[tactic] for tactic in running], draws))
        return [None if tactic in self.failures else tuple(next(series)) for tactic in tactics]


def mean_of_ranks(ranks: Sequence[Series]) -> Series:
    """Sample by sample the mean over the ranks; None where a tactic failed on one of them."""
    pooled: Series = []
    for of_ranks in zip(*ranks, strict=True):
        present = [series for series in of_ranks if series is not None]
        ran_everywhere = len(present) == len(of_ranks)
        pooled.append(tuple(sum(at) / len(at) for at in zip(*present, strict=True)) if ran_everywhere else None)
    return pooled


def choose(
    bench: EngineBench,
    tactics: Sequence[Tactic],
    stress_draws: Mapping[str, int],
    routings: Sequence[Routing],
    rows: int,
    tried: int,
) -> Choice:
    """The final of one bucket: the first of `tactics`, the default, stays unless another beats it beyond the margin.

    Args:
        bench: its draws 0 … `len(routings)` − 1 are the regime's.
        tactics: the default, then the finalists.
        stress_draws: further draws of the bench, by the factor on the busiest expert's load.
        routings: what the draws are.
        rows: of the bucket.
        tried: how many tactics the search timed.

    Raises:
        NoResultError: the default did not run.
    """
    default, *finalists = tactics
    final = play(bench, default, finalists, range(len(routings)), SECONDS)
    verdict = decide(dataclasses.replace(final, noise=max(final.noise, MARGIN)), bench, stress_draws)
    rejected = {**bench.failures, **verdict.cliffs}
    return Choice(
        rows=rows,
        tactic=verdict.tactic,
        time_us=median(verdict.samples_us),
        default_tactic=default,
        default_time_us=median(final.default_us),
        gain=verdict.gain.value,
        gain_low=verdict.gain.low,
        gain_high=verdict.gain.high,
        noise=final.noise,
        stress_us=dict(verdict.stress_us),
        default_stress_us=dict(verdict.default_stress_us),
        tried=tried,
        candidates=tried,
        rejected=tuple(Rejection(tactic=tactic, reason=reason) for tactic, reason in rejected.items()),
        load=tuple(int(slots) for slots in sum(routing.load for routing in routings)),  # type: ignore[union-attr]
        max_load=max(int(routing.load.max()) for routing in routings),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
