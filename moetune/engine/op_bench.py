"""The engine's own op as a bench, on which FlashInfer's fastest tactics are compared with its default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from moetune.engine.ranks import gather
from moetune.measure.reasons import reason_of
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice
from moetune.tuning.final_comparison import FinalSamples, compare_right_ones
from moetune.tuning.objective import SINGLE, Objective
from moetune.tuning.verdict import choice, cliffs, decide, loss, stress_times

if TYPE_CHECKING:
    import torch

    from moetune.engine.exchange import Exchange
    from moetune.measure.bench import Series
    from moetune.measure.clock import Clock, TimedCall
    from moetune.workload.draws import Draw

MARGIN = 0.03
"""A tactic must be faster than the default by more than this, however small the noise (as in flashinfer #3537)."""
SECONDS = 1.0
"""The longest time of one final comparison in seconds, unless its fewest rounds take longer."""
FINALISTS = 3
"""How many of the fastest tactics are compared with the default."""
CHECKED_ROWS = 2048
"""Outputs are compared on about this many evenly spaced rows, because an engine leaves little memory free."""
LEAST_RMS = 1e-30
"""Outputs with a smaller root mean square are not compared: near bf16's subnormal numbers the rounding errors are too
large. The random scales among the tuner's inputs can make outputs so small."""


class EngineBench:
    """`BenchLike` over calls of the engine's op.

    Its times are those of the slowest rank, so that all ranks choose the same tactic: the one with which the all-to-all
    after the op ends first.

    Args:
        calls: for each tactic, a function that runs it on the draw at a position.
        clock: measures the times.
        default: the tactic with whose output all others are compared.
        tolerance: the largest relative Frobenius error allowed against it.
        ranks: the ranks that time the same tactics in the same order, or None.
        name: what is compared, for errors.

    Attributes:
        failures: the tactics that failed or were wrong on any rank, each with the reason.
        eager: the tactics that were timed without a CUDA graph on this rank, each with the reason.
    """

    def __init__(
        self,
        calls: Mapping[Tactic, TimedCall],
        clock: Clock,
        default: Tactic,
        tolerance: float,
        ranks: Exchange | None = None,
        name: str = "",
    ) -> None:
        self.failures: dict[Tactic, str] = {}
        self.eager: dict[Tactic, str] = {}
        self._calls, self._clock, self._ranks, self._name = calls, clock, ranks, name
        self._default, self._tolerance = default, tolerance
        self._warm: set[Tactic] = set()
        self._expected: dict[int, torch.Tensor | None] = {}

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int], limit_us: float = math.inf) -> Series:
        """See `Bench.samples`. Every rank must call it. No tactic is stopped."""
        try:
            mine = self._samples(tactics, draws)
        except Exception as error:  # a kernel may raise anything, and the other ranks wait for this rank's times
            mine = [None] * len(tactics)
            self.failures.update((tactic, reason_of(error)) for tactic in tactics)
        failed = {tactic: self.failures[tactic] for tactic in tactics if tactic in self.failures}
        self._say(f"{len(tactics)} tactics on {len(draws)} draws")
        series, reasons = zip(*gather((mine, failed), self._ranks), strict=True)
        for tactic, reason in on_ranks(reasons, self._ranks).items():
            self.failures.setdefault(tactic, reason)
        return slowest_samples(series)

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Returns whether the output of `tactic` agrees with that of the default on every rank.

        Inside an engine there is no fp32 reference. But it is unlikely that two tactics make the same error. The tactic
        only has to run if the outputs cannot be compared: the op returns no single tensor of rows
        (`do_finalize=False`, where the order of the rows depends on the tactic), or the default's output has no finite
        number or is almost zero. Every rank must call it.
        """
        found = self.failures.get(tactic) or self._disagreement(tactic, draw)
        self._say("the check of a tactic")
        reasons = on_ranks([{tactic: found} if found else {} for found in gather(found, self._ranks)], self._ranks)
        if reasons:
            self.failures.setdefault(tactic, reasons[tactic])
        return not reasons

    def _say(self, step: str) -> None:
        if self._ranks is not None:
            self._ranks.step = f"{self._name}: {step}"

    def _disagreement(self, tactic: Tactic, draw: int) -> str | None:
        if draw not in self._expected:
            try:
                self._expected[draw] = output_of(self._calls[self._default], draw)
            except Exception:  # the final comparison runs the default again, and reports its error
                self._expected[draw] = None
        expected = self._expected[draw]
        if expected is None:
            return None
        try:
            found = output_of(self._calls[tactic], draw)
            error = None if found is None else _relative_error(found, expected)
        except Exception as raised:  # a kernel may raise anything
            return reason_of(raised)
        if error is None or error <= self._tolerance:
            return None
        return f"wrong result: relative error {error:.1e} against the default's, allowed {self._tolerance:.0e}"

    def _samples(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> Series:
        for tactic in {*tactics} - self._warm - self.failures.keys():
            try:
                self._clock.warm_up(self._calls[tactic], draws[0])
                self._warm.add(tactic)
            except Exception as error:  # a kernel may raise anything
                self.failures[tactic] = reason_of(error)
        running = [tactic for tactic in tactics if tactic not in self.failures]
        series = iter(self._clock.paired_samples([self._calls[tactic] for tactic in running], draws))
        self.eager.update((running[position], reason) for position, reason in self._clock.eager.items())
        return [None if tactic in self.failures else tuple(next(series)) for tactic in tactics]


def slowest_samples(ranks: Sequence[Series]) -> Series:
    """Returns the largest over the ranks of each sample; None for a tactic that failed on any rank.

    Sample i is of the same sampled routing on all ranks, of which each rank computes its own part.
    """
    pooled: Series = []
    for of_ranks in zip(*ranks, strict=True):
        present = [series for series in of_ranks if series is not None]
        ran_everywhere = len(present) == len(of_ranks)
        pooled.append(tuple(map(max, zip(*present, strict=True))) if ran_everywhere else None)
    return pooled


def on_ranks(reasons: Sequence[Mapping[Tactic, str]], ranks: Exchange | None) -> dict[Tactic, str]:
    """Returns why each tactic failed. With several ranks the reason names the first rank on which it failed.

    Args:
        reasons: the failed tactics of each rank, in rank order.
        ranks: the ranks, or None if there is one.
    """
    found: dict[Tactic, str] = {}
    for rank, of_rank in enumerate(reasons):
        for tactic, reason in of_rank.items():
            found.setdefault(tactic, reason if ranks is None else f"{ranks.name(rank)}: {reason}")
    return found


def output_of(call: TimedCall, draw: int) -> torch.Tensor | None:
    """Returns about `CHECKED_ROWS` rows of the output of a call, or None if it does not return a single matrix.

    The call runs twice, because ops write into a buffer of the caller, which may still hold another tactic's output.
    """
    output = _matrix(call(draw))
    if output is None:
        return None
    output.zero_()
    again = _matrix(call(draw))
    return None if again is None else again[:: max(1, len(again) // CHECKED_ROWS)].clone()


def _matrix(returned: Any) -> torch.Tensor | None:
    import torch

    outputs = returned if isinstance(returned, list | tuple) else [returned]
    if len(outputs) == 1 and isinstance(outputs[0], torch.Tensor) and outputs[0].ndim == 2:
        return outputs[0]
    return None


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Returns the relative Frobenius error of `found` where `expected` is finite; NaN if `found` is not finite there.

    Returns None if a comparison with `expected` means nothing, because the tuner's random inputs made it overflow or
    almost zero.
    """
    from moetune.backends.reference import relative_error

    finite = expected[expected.isfinite()].double()
    if not len(finite) or finite.norm() < LEAST_RMS * len(finite) ** 0.5:
        return None
    return relative_error(found, expected, ignore_nonfinite=True)


def choose(
    bench: EngineBench,
    tactics: Sequence[Tactic],
    draws: Sequence[Draw],
    rows: int,
    tried: int,
    objective: Objective = SINGLE,
) -> Choice:
    """Runs the final comparison of one bucket and returns its choice.

    The first `FINALISTS` tactics whose outputs agree with the default's are compared with it, at each row count that
    the draws of each distribution have. One of them replaces the default only if it is faster by more than `MARGIN` and
    the noise.

    Args:
        bench: times the tactics on `draws`, which it knows by their positions.
        tactics: the default, then the others from the fastest to the slowest; the same on every rank.
        draws: draws of the kinds `final` and `stress`; those of one distribution lie together.
        rows: the bucket.
        tried: how many tactics FlashInfer's sweep timed.
        objective: what the choice minimizes over the distributions of the draws.

    Raises:
        NoResultError: the default did not run.
    """
    default, *others = tactics
    finalists = list(islice((tactic for tactic in others if bench.check(tactic, 0)), FINALISTS))
    stress_us = stress_times(bench, finalists, default, draws, {})
    rejected = cliffs(stress_us, default, {})
    remaining = [tactic for tactic in finalists if tactic not in rejected and tactic not in bench.failures]
    able = remaining
    numbers: dict[tuple[str, int], list[int]] = {}
    for number, draw in enumerate(draws):
        if draw.kind == "final":
            numbers.setdefault((draw.distribution, draw.rows), []).append(number)
    comparisons: list[FinalSamples] = []
    for (distribution, row_count), of_count in numbers.items():
        if comparisons and comparisons[-1].distribution != distribution:
            remaining = [tactic for tactic in able if tactic not in bench.failures]
        samples = compare_right_ones(bench, default, remaining, of_count, row_count, most_s=SECONDS / len(numbers))
        remaining = [tactic for tactic in samples.finalists if not loss(samples, tactic)]
        comparisons.append(dataclasses.replace(samples, distribution=distribution))
    with_margin = [dataclasses.replace(samples, noise=max(samples.noise, MARGIN)) for samples in comparisons]
    verdict = decide(with_margin, default, objective=objective)
    routings = [draw.routing for draw in draws if draw.kind == "final"]
    return choice(
        comparisons,
        verdict,
        bench,
        routings,
        rows=rows,
        default=default,
        tried=tried,
        candidates=tried,
        stress_us=stress_us,
        rejected=rejected,
        objective=objective,
    )
