"""Answers one call of FlashInfer's tuner: from the store if it has the buckets, otherwise by measuring them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from moetune.engine import session as sessions
from moetune.engine.dummies import Dummies
from moetune.engine.flashinfer_ops import MoEOp, RoutingInput, recognize
from moetune.engine.op_bench import EngineBench, choose
from moetune.engine.ranks import broadcast, common, engine_group, gather, leads, together
from moetune.engine.session import Session
from moetune.engine.stored import (
    Answers,
    environment_of,
    native_of,
    offline_choices,
    regime_of_buckets,
    tactic_of,
    tolerance_of,
)
from moetune.engine.tuner_call import TunerCall
from moetune.errors import MissError, MoetuneError
from moetune.spec.regime import Regime
from moetune.spec.tactic import UNTUNED
from moetune.store.profile import Choice, Profile

if TYPE_CHECKING:
    from moetune.workload.draws import Draw
    from moetune.workload.routing import Routing

OPS = ("flashinfer::trtllm_", "trtllm::fused_moe::", "CuteDsl")
"""How the tuner's names of the MoE ops begin. For any other op, nothing but this comparison is run."""
DRAWS = 8
"""The largest number of draws in a final comparison; stress draws are not counted."""
FIRST_DRAW = 2
"""The number of a final comparison's first draw. FlashInfer's sweep uses draw 0."""


def answer(session: Session, call: TunerCall) -> None:
    """Places the session's choices for the buckets of `call` in FlashInfer's cache, if its op computes the layer.

    Outside of tuning mode nothing is measured, and the store is read once. An error never stops the engine: it is
    logged, and the op is left to FlashInfer.
    """
    if not call.op.startswith(OPS) or call.identity in session.passed:
        return
    tuning = call.tuner.is_tuning_mode
    session.has_tuned = session.has_tuned or tuning
    is_known = call.identity in session.looked_up
    if is_known and not tuning:
        return
    session.looked_up.add(call.identity)
    try:
        if is_known and call.signature in session.answered:
            _place_again(session, call, session.answered[call.signature])
            return
        op = recognize(session.layer, session.regime, session.rank, call.op, call.runner, call.inputs, call.arguments)
        if op is None:
            session.passed.add(call.identity)
            return
        group = _group(session, tuning)
        # What was placed outside tuning mode may differ between ranks: all of them must ask for the same buckets.
        known = session.placed.keys() if group is None or not tuning else session.agreed
        _place_again(session, call, [key for key in call.keys.values() if key in known])
        fresh = [rows for rows, key in call.keys.items() if key not in known]
        if fresh:
            with _passing_through():
                _fill(session, call, op, fresh, group)
        if tuning:
            session.answered[call.signature] = tuple(key for key in call.keys.values() if key in session.placed)
    except Exception as error:  # an engine must start, whatever fails while it tunes
        session.logger.warning("moetune: %s is left to FlashInfer: %s: %s", call.op, type(error).__name__, error)
        if tuning:  # an error before the warm-up must not keep one rank from what the others do together in it
            session.passed.add(call.identity)
            session.count(call.op, missed=list(call.profiles))
            session.announce()


def _place_again(session: Session, call: TunerCall, keys: Iterable[Any]) -> None:
    """Places those of the session's tactics that FlashInfer's cache no longer holds."""
    choices = call.tuner.choices
    for key in keys:
        tactic, profile = session.placed[key]
        if not choices.holds(key, tactic):
            choices.place(key, tactic, profile, call.effective_config)


@contextmanager
def _passing_through() -> Iterator[None]:
    """Lets all calls inside pass through: those that are made while an answer is found."""
    token = sessions.enter(None)
    try:
        yield
    finally:
        sessions.leave(token)


def _fill(session: Session, call: TunerCall, op: MoEOp, fresh: Sequence[int], group: Any) -> None:
    """Places the stored choices of the buckets `fresh`; in tuning mode it measures the other buckets."""
    regime = regime_of_buckets(session.regime, list(call.profiles))
    possible = [rows for rows in fresh if rows in regime.buckets]
    if op.routing_input is RoutingInput.NONE:
        _fill_cutlass(session, call, op, regime, possible, group)
    else:
        answers = _answers(session, call, op, regime)
        missing = _served(session, call, answers, possible, group)
        if missing and call.tuner.is_tuning_mode:
            _measure(session, call, answers, op, missing, group)
    missed = [rows for rows in fresh if call.keys[rows] not in session.placed]
    session.count(op.backend, missed=missed)
    if missed and not call.tuner.is_tuning_mode:
        _log_miss(session, call.op, len(missed))
    if call.tuner.is_tuning_mode or session.served:
        session.announce()


def _log_miss(session: Session, op: str, buckets: int) -> None:
    """Logs that FlashInfer's default runs. Before the warm-up, which will tune the op, only at DEBUG."""
    session.logger.log(
        logging.WARNING if session.has_tuned else logging.DEBUG,
        "moetune: no stored tactic for %d buckets of %s: FlashInfer's default runs. "
        "Call it in the engine's FlashInfer warm-up, or run `moetune tune` first.",
        buckets,
        op,
    )


def _answers(session: Session, call: TunerCall, op: MoEOp, regime: Regime) -> Answers:
    from moetune.inputs.flashinfer_versions import version

    environment = environment_of(op.backend, call.device(), str(version()), call.op, call.identity)
    return Answers(session.store, session.layer, regime, op.backend, environment)


def _place(session: Session, call: TunerCall, rows: int, tactic: Any) -> None:
    key, profile = call.keys[rows], call.profiles[rows]
    call.tuner.choices.place(key, tactic, profile, call.effective_config)
    session.placed[key] = (tactic, profile)
    session.placed_profiles[id(profile)] = profile
    if call.tuner.is_tuning_mode:
        session.agreed.add(key)


def _group(session: Session, tuning: bool) -> Any:
    """Returns the ranks that must choose the same tactics, or None.

    The engine's group is taken in tuning mode only. Outside of it a rank may call an op that the others do not call.
    """
    from flashinfer.autotuner import get_autotune_process_group

    if session.group is not None:
        return session.group
    group = get_autotune_process_group()
    return engine_group() if group is None and tuning else group


def _served(session: Session, call: TunerCall, answers: Answers, rows: Sequence[int], group: Any) -> list[int]:
    """Places the stored choices of the buckets `rows`. Returns the buckets that have none.

    A bucket is served only if every rank of `group` has stored the same tactic for it.
    """
    stored = together(lambda: _stored(call, answers, rows), group)
    everywhere = gather({bucket: choice.tactic for bucket, choice in stored.items()}, group)
    served = [bucket for bucket in stored if all(theirs.get(bucket) == stored[bucket].tactic for theirs in everywhere)]
    for bucket in served:
        _place(session, call, bucket, native_of(stored[bucket].tactic))
    session.count(answers.backend, served=served)
    return [bucket for bucket in rows if bucket not in served]


def _stored(call: TunerCall, answers: Answers, rows: Sequence[int]) -> dict[int, Choice]:
    """Returns those of the buckets `rows` for which the store has a choice."""
    stored = {bucket: choice for bucket, choice in answers.load().items() if bucket in rows}
    if unknown := [bucket for bucket in rows if bucket not in stored]:
        stored |= offline_choices(answers, {bucket: call.keys[bucket].file_key for bucket in unknown})
    return stored


def _measure(session: Session, call: TunerCall, answers: Answers, op: MoEOp, rows: Sequence[int], group: Any) -> None:
    """Measures the buckets `rows`, places their choices and stores them.

    FlashInfer times every tactic on sampled routings of the regime. Then a final comparison decides.
    """
    dummies = Dummies(session.layer, answers.regime, op, call)
    rows = [bucket for bucket in rows if dummies.typical_rows(bucket)]
    missing = frozenset(call.keys[bucket] for bucket in rows)
    times = together(lambda: call.tuner.swept(call, missing, dummies.hook), group)
    timed = common(times.keys(), group)  # a bucket's sweep may fail on one rank
    rows = [bucket for bucket in rows if bucket in timed]
    choices = [_final(session, call, dummies, bucket, times[bucket], group) for bucket in rows]
    for choice in choices:
        _place(session, call, choice.rows, native_of(choice.tactic))
    session.count(op.backend, tuned=[choice.rows for choice in choices])
    if choices and (problem := answers.save(choices)):
        session.logger.warning("moetune: %s", problem)


def _final(
    session: Session, call: TunerCall, dummies: Dummies, rows: int, swept: Sequence[tuple[Any, float]], group: Any
) -> Choice:
    """Compares FlashInfer's fastest tactics with its default, on draws that its sweep did not use.

    Args:
        session: the session.
        call: the call of the tuner.
        dummies: samples the regime's routings into the inputs of `call`.
        rows: the bucket.
        swept: the (tactic, time) pairs of FlashInfer's sweep. On each rank they are that rank's own.
        group: the ranks that must choose the same tactic, or None.
    """
    from moetune.measure.clock import clock_for

    draws, inputs = together(lambda: _final_inputs(session, call, dummies, rows), group)
    order = sorted((time, at) for at, (tactic, time) in enumerate(swept) if tactic != UNTUNED)
    others = broadcast([swept[at][0] for _, at in order], group)  # all ranks must use the same order
    calls = {tactic_of(native): partial(call.run, inputs, native) for native in (UNTUNED, *others)}
    default = tactic_of(UNTUNED)
    bench = EngineBench(calls, clock_for(call.device()), default, tolerance_of(session.layer), group)
    return choose(bench, tuple(calls), draws, rows, len(swept))


def _final_inputs(
    session: Session, call: TunerCall, dummies: Dummies, rows: int
) -> tuple[tuple[Draw, ...], list[list[Any]]]:
    """Returns the draws of a bucket's final comparison, and the inputs of the op for each."""
    from moetune.workload.draws import STRESS_FACTORS

    tensors = call.tuner._prepare_input_tensors(call.profiles[rows], call.inputs)
    if call.config.inputs_pre_hook is not None:
        tensors = list(call.config.inputs_pre_hook(tensors))
    unseen = dummies.draws(rows, range(FIRST_DRAW, FIRST_DRAW + min(session.regime.draws, DRAWS)), "final")
    stressed = [dummies.stressed(unseen[0], factor) for factor in STRESS_FACTORS]
    draws = (*unseen, *stressed)
    inputs = [
        *(dummies.placed(tensors, draw.routing) for draw in unseen),
        *(_placed_or_same(dummies, draw.routing, unseen[0].routing, tensors) for draw in stressed),
    ]
    return draws, inputs


def _placed_or_same(dummies: Dummies, stressed: Routing, routing: Routing, tensors: Sequence[Any]) -> list[Any]:
    """Returns the inputs of the routing `stressed`, or of `routing` if no router logits produce the stressed ids."""
    try:
        return dummies.placed(tensors, stressed)
    except MoetuneError:
        return dummies.placed(tensors, routing)


def _fill_cutlass(
    session: Session, call: TunerCall, op: MoEOp, regime: Regime, rows: Sequence[int], group: Any
) -> None:
    """Places the choices of `cutlass_fused_moe`, whose tuner call has no routing among its inputs.

    The first rank tunes the op with moetune's own backend, for all ranks.
    """
    is_tuned = session.profiles.get((regime.digest, True)) is not None
    asked = (regime.digest, is_tuned or bool(call.tuner.is_tuning_mode))
    if asked not in session.profiles:
        found = _cutlass_profile(session, call, op, regime) if leads(group) else None
        session.profiles[asked] = _counted(session, op, broadcast(found, group))
    profile = session.profiles[asked]
    if profile is None:
        return
    which = "gemm1" if op.name.endswith("gemm1") else "gemm2"
    for choice in profile.choices:
        if choice.rows in rows:
            _place(session, call, choice.rows, int(choice.tactic[which]))


def _counted(session: Session, op: MoEOp, found: tuple[str, set[int]] | None) -> Profile | None:
    """Returns the profile that `_cutlass_profile` found on the first rank; its buckets are counted on every rank."""
    if found is None:
        return None
    text, tuned = found
    profile = Profile.model_validate_json(text)
    session.count(
        op.backend, tuned=tuned, served=[choice.rows for choice in profile.choices if choice.rows not in tuned]
    )
    return profile


def _cutlass_profile(session: Session, call: TunerCall, op: MoEOp, regime: Regime) -> tuple[str, set[int]] | None:
    """Returns a profile as JSON and the buckets that were measured for it; None, logged, if there is none.

    In tuning mode it is measured, otherwise read from the store.
    """
    from moetune.tuning.events import BucketChosen
    from moetune.tuning.tune import load, tune

    tuned: set[int] = set()

    def note(event: object) -> None:
        if isinstance(event, BucketChosen):
            tuned.add(event.choice.rows)

    question = (session.layer, regime, op.backend, session.store)
    try:
        if call.tuner.is_tuning_mode:
            profile = tune(*question, device=call.device(), isolate=False, on_event=note)
        else:
            profile = load(*question, device=call.device())
        return profile.model_dump_json(), tuned
    except MissError as error:  # `_log_miss` says what to do
        session.logger.debug("moetune: %s: %s", op.name, error)
    except MoetuneError as error:
        session.logger.warning("moetune: %s is left to FlashInfer: %s", op.name, error)
    except Exception as error:  # an error must not end this rank: the other ranks wait for its profile
        session.logger.warning("moetune: %s is left to FlashInfer: %s: %s", op.name, type(error).__name__, error)
    return None
