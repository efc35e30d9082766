"""Measures the buckets of one FlashInfer op: FlashInfer's sweep, then a final comparison with its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moetune.engine.dummies import Dummies
from moetune.engine.exchange import Exchange
from moetune.engine.op_bench import EngineBench, choose
from moetune.engine.ranks import gather, together
from moetune.engine.session import Session
from moetune.engine.stored import native_of, tactic_of, tolerance_of
from moetune.engine.strategy import RankStrategy
from moetune.engine.sweep import Sweep, joined
from moetune.engine.tuner_call import TunerCall
from moetune.errors import LostRankError, MoetuneError
from moetune.measure.reasons import reason_of
from moetune.spec.tactic import UNTUNED
from moetune.store.profile import Choice
from moetune.tuning.objective import Objective

if TYPE_CHECKING:
    from moetune.measure.clock import Clock
    from moetune.workload.draws import Draw
    from moetune.workload.routing import Routing

DRAWS = 8
"""The largest number of draws in a final comparison; stress draws are not counted."""
FIRST_DRAW = 2
"""The number of a final comparison's first draw. FlashInfer's sweep uses draw 0."""


@dataclass(frozen=True)
class OpTune:
    """Measures buckets of one call of FlashInfer's tuner.

    Attributes:
        session: the session.
        call: the call.
        dummies: samples the regime's routings into the inputs of the call.
        ranks: the ranks that measure together, or None if this one measures alone.
    """

    session: Session
    call: TunerCall
    dummies: Dummies
    ranks: Exchange | None

    def choices(self, rows: Sequence[int]) -> list[Choice]:
        """Returns the choices of the buckets `rows`. Buckets that cannot be compared are left out, and logged.

        FlashInfer times the tactics on sampled routings of the regime's main distribution. Then a final comparison
        decides, under all distributions.

        Raises:
            LostRankError: a rank is missing, so that no bucket can be decided for all.
            RankError: another rank cannot take times, or its sweep failed.
            Exception: why this rank cannot take times, for example for lack of memory.
        """
        from moetune.measure.clock import clock_for

        self._say("the sweep of FlashInfer")
        mine = together(lambda: self._sweep([bucket for bucket in rows if self._has_rows(bucket)]), self.ranks)
        sweep = joined(gather(mine, self.ranks), self.session.strategy, self.ranks)
        for tactic, reason in list(sweep.uneven.items())[:1]:
            self.session.logger.warning(
                "moetune: %d tactics of %s run on some ranks only, so none takes them: %s: %s",
                len(sweep.uneven),
                self.call.op,
                tactic,
                reason,
            )
        clock = together(lambda: clock_for(self.call.device()), self.ranks)
        found, reasons = [], {}
        for bucket in rows:
            if bucket not in sweep.milliseconds:
                continue
            try:
                found.append(self._final(bucket, sweep, clock))
            except LostRankError:
                raise
            except Exception as error:
                reasons[bucket] = reason_of(error)
        if reasons:
            bucket, reason = next(iter(reasons.items()))
            self.session.logger.warning(
                "moetune: %d buckets of %s have no choice; that of %d rows: %s",
                len(reasons),
                self.call.op,
                bucket,
                reason,
            )
        return found

    def _sweep(self, rows: Sequence[int]) -> Sweep:
        """Returns this rank's times of its share of the tactics."""
        is_split = self.ranks is not None and self.session.strategy is RankStrategy.PARALLEL
        share = (self.ranks.rank, self.ranks.size) if self.ranks is not None and is_split else (0, 1)
        missing = frozenset(self.call.keys[bucket] for bucket in rows)
        sweep: Sweep = self.call.tuner.swept(self.call, missing, self._of_each[0].hook, share)
        return sweep

    @property
    def _of_each(self) -> list[Dummies]:
        """Returns the dummies of each of the regime's distributions, the main one first."""
        from moetune.workload.draws import named_parts

        parts = named_parts(self.dummies.regime)
        return [replace(self.dummies, regime=part, distribution=name) for name, part in parts.items()]

    def _has_rows(self, bucket: int) -> bool:
        return all(dummies.typical_rows(bucket) for dummies in self._of_each)

    def _final(self, rows: int, sweep: Sweep, clock: Clock) -> Choice:
        """Compares FlashInfer's fastest tactics with its default, on draws that its sweep did not use.

        Args:
            rows: the bucket.
            sweep: FlashInfer's sweep. It is the same on all ranks.
            clock: takes this rank's times.
        """
        call, name = self.call, f"{rows} rows of {self.call.op}"
        self._say(name)
        draws, inputs = together(lambda: self._inputs(rows), self.ranks)
        swept = sweep.milliseconds[rows]
        order = sorted((time, at) for at, (tactic, time) in enumerate(swept) if tactic != UNTUNED)
        natives = [UNTUNED, *(swept[at][0] for _, at in order)]
        calls = {tactic_of(native): partial(call.run, inputs, native) for native in natives}
        default = tactic_of(UNTUNED)
        tolerance = tolerance_of(self.session.layer)
        bench = EngineBench(calls, clock, default, tolerance, self.ranks, name)
        if self.ranks is not None:  # they may run on other ranks
            failed = sweep.failures.get(rows, {})
            bench.failures.update((tactic, reason) for tactic, reason in failed.items() if tactic != default)
        return choose(bench, tuple(calls), draws, rows, len(swept), Objective.of(self.dummies.regime))

    def _inputs(self, rows: int) -> tuple[tuple[Draw, ...], list[list[Any]]]:
        """Returns the draws of a bucket's final comparison, and the inputs of the op for each.

        The distributions share the draws. Each has at least two, because draws with even numbers have other rows than
        the others.
        """
        from moetune.workload.draws import STRESS_FACTORS

        call, of_each = self.call, self._of_each
        dummies, in_all = of_each[0], min(self.session.regime.draws, DRAWS)
        numbers = range(FIRST_DRAW, FIRST_DRAW + max(min(2, in_all), in_all // len(of_each)))
        tensors = call.tuner._prepare_input_tensors(call.profiles[rows], call.inputs)
        if call.config.inputs_pre_hook is not None:
            tensors = list(call.config.inputs_pre_hook(tensors))
        unseen = [draw for each in of_each for draw in each.draws(rows, numbers, "final")]
        stressed = [dummies.stressed(unseen[0], factor) for factor in STRESS_FACTORS]
        draws = (*unseen, *stressed)
        inputs = [
            *(dummies.placed(tensors, draw.routing) for draw in unseen),
            *(_placed_or_same(dummies, draw.routing, unseen[0].routing, tensors) for draw in stressed),
        ]
        return draws, inputs

    def _say(self, step: str) -> None:
        if self.ranks is not None:
            self.ranks.step = step


def _placed_or_same(dummies: Dummies, stressed: Routing, routing: Routing, tensors: Sequence[Any]) -> list[Any]:
    """Returns the inputs of the routing `stressed`, or of `routing` if no router logits produce the stressed ids."""
    try:
        return dummies.placed(tensors, stressed)
    except MoetuneError:
        return dummies.placed(tensors, routing)


def tactics_of(choices: Sequence[Choice]) -> dict[int, Any]:
    """Returns FlashInfer's tactic of each choice, by rows."""
    return {choice.rows: native_of(choice.tactic) for choice in choices}
