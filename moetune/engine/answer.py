"""Answers one call of FlashInfer's tuner: from the store if it has the buckets, otherwise by measuring them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moetune.engine import session as sessions
from moetune.engine.cutlass_answer import fill_cutlass
from moetune.engine.dummies import Dummies
from moetune.engine.exchange import Exchange
from moetune.engine.flashinfer_ops import MoEOp, RoutingInput, recognize
from moetune.engine.op_tune import OpTune, tactics_of
from moetune.engine.placing import place, place_again, place_defaults
from moetune.engine.ranks import engine_group, from_first, gather, together, writes
from moetune.engine.session import Session
from moetune.engine.stored import Answers, environment_of, native_of, offline_choices, regime_of_buckets
from moetune.engine.strategy import RankStrategy
from moetune.engine.tuner_call import TunerCall
from moetune.errors import LostRankError, RankError
from moetune.measure.reasons import reason_of
from moetune.spec.regime import Regime
from moetune.store.profile import Choice

OPS = ("flashinfer::trtllm_", "trtllm::fused_moe::", "CuteDsl")
"""How the tuner's names of the MoE ops begin. For any other op, nothing but this comparison is run."""


def answer(session: Session, call: TunerCall) -> None:
    """Places the session's choices for the buckets of `call` in FlashInfer's cache, if its op computes the layer.

    Outside of tuning mode nothing is measured, and the store is read once. It raises nothing, because an engine must
    start whatever fails: an error is logged, and the op is left to FlashInfer.
    """
    if not call.op.startswith(OPS) or call.op in session.passed:
        return
    try:
        _answer_or_leave(session, call)
    except Exception as error:
        session.passed.add(call.op)
        session.logger.warning("moetune: %s is left to FlashInfer: %s: %s", call.op, type(error).__name__, error)


def _answer_or_leave(session: Session, call: TunerCall) -> None:
    """Answers a call, or leaves it to FlashInfer after an error.

    If the ranks of a group cannot choose together, all of them run FlashInfer's default, because a sweep of their own
    could end in different tactics.

    Raises:
        Exception: FlashInfer's key of the call, or its place in FlashInfer's cache, cannot be found.
    """
    if call.identity in session.passed:
        return
    tuning = call.tuner.is_tuning_mode
    session.has_tuned = session.has_tuned or tuning
    is_known = call.identity in session.looked_up
    if is_known and not tuning:
        return
    session.looked_up.add(call.identity)
    group = None
    try:
        group = _group(session, tuning)
        if call.identity in session.undecided:
            place_defaults(session, call, call.keys)
        elif is_known and call.signature in session.answered:
            place_again(session, call, session.answered[call.signature])
        else:
            _answer(session, call, session.exchange(group))
    except Exception as error:  # a kernel, the store or another rank may fail
        if isinstance(error, LostRankError):
            session.lost = str(error)
        session.logger.warning(
            "moetune: %s is left to FlashInfer%s: %s",
            call.op,
            _instead(session, group),
            str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}",
        )
        if tuning:
            if group is None:
                session.passed.add(call.identity)
            else:
                session.undecided.add(call.identity)
                place_defaults(session, call, call.keys)
            session.count(call.op, missed=list(call.profiles))
            session.announce()


def _instead(session: Session, group: Any) -> str:
    """Returns what of FlashInfer an op is left to, after its name: its own tuning, or its default."""
    if group is None:
        return ""
    return "'s default" if session.strategy is RankStrategy.INDEPENDENT else "'s default on all ranks"


def _answer(session: Session, call: TunerCall, ranks: Exchange | None) -> None:
    """Answers a call that may be one of the session's layer. With several ranks it is the same call on all of them."""
    tuning = call.tuner.is_tuning_mode
    # What was placed outside tuning mode may differ between ranks: all of them must ask for the same buckets.
    known = session.placed.keys() if ranks is None or not tuning else session.agreed
    op, fresh = _asked(session, call, known, ranks)
    if op is None:
        if tuning:
            session.passed.add(call.identity)
        return
    place_again(session, call, [key for key in call.keys.values() if key in known])
    if fresh:
        with _passing_through():
            _fill(session, call, op, fresh, ranks)
    if tuning:
        session.answered[call.signature] = tuple(key for key in call.keys.values() if key in session.placed)


def _asked(
    session: Session, call: TunerCall, known: Iterable[Any], ranks: Exchange | None
) -> tuple[MoEOp | None, list[int]]:
    """Returns the MoE op of the call, and its buckets that have no tactic yet.

    The op is None if it does not compute the session's layer on any one rank.

    Raises:
        RankError: it cannot be recognized on a rank, or the ranks ask for different buckets.
    """
    if ranks is not None:
        ranks.step = f"the call of {call.op}"

    def recognized() -> tuple[MoEOp | None, list[int]]:
        op = recognize(session.layer, session.regime, session.rank, call.op, call.runner, call.inputs, call.arguments)
        return op, [] if op is None else [rows for rows, key in call.keys.items() if key not in known]

    op, fresh = together(recognized, ranks)
    if ranks is None:
        return op, fresh
    of_ranks = gather((op is not None, fresh), ranks)
    others = [rank for rank, (is_ours, _) in enumerate(of_ranks) if not is_ours]
    if others and len(others) < ranks.size:
        session.logger.warning(
            "moetune: %s does not compute %s on %s, so all ranks leave it to FlashInfer",
            call.op,
            session.layer.name,
            ranks.name(others[0]),
        )
    if others:
        return None, []
    for rank, (_, theirs) in enumerate(of_ranks):
        if theirs != of_ranks[0][1]:
            raise RankError(
                f"{ranks.name(rank)} asks for the buckets {theirs}, but {ranks.name(0)} for {of_ranks[0][1]}.",
                "Give all ranks the same largest number of tokens, and call the same ops on all of them.",
            )
    return op, fresh


@contextmanager
def _passing_through() -> Iterator[None]:
    """Lets all calls inside pass through: those that are made while an answer is found."""
    token = sessions.enter(None)
    try:
        yield
    finally:
        sessions.leave(token)


def _fill(session: Session, call: TunerCall, op: MoEOp, fresh: Sequence[int], ranks: Exchange | None) -> None:
    """Places the stored choices of the buckets `fresh`; in tuning mode it measures the other buckets."""
    tuning = call.tuner.is_tuning_mode
    regime = regime_of_buckets(session.regime, list(call.profiles))
    possible = [rows for rows in fresh if rows in regime.buckets]
    if op.routing_input is RoutingInput.NONE:
        fill_cutlass(session, call, op, regime, possible, ranks)
    else:
        served, tuned = _found(session, call, op, regime, possible, ranks)
        for rows, tactic in (served | tuned).items():
            place(session, call, rows, tactic)
        session.count(op.backend, served=served, tuned=tuned)
    known = session.placed.keys() if ranks is None or not tuning else session.agreed
    missed = [rows for rows in fresh if call.keys[rows] not in known]
    if tuning and op.routing_input is not RoutingInput.NONE and _group(session, tuning) is not None:
        # each rank's own sweep has left its own tactics in the cache
        place_defaults(session, call, [rows for rows in missed if rows in possible])
    session.count(op.backend, missed=missed)
    if missed and not tuning:
        _log_miss(session, call.op, len(missed))
    if tuning or session.served:
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


def _group(session: Session, tuning: bool) -> Any:
    """Returns the ranks that must choose the same tactics, or None.

    The engine's group is taken in tuning mode only. Outside of it a rank may call an op that the others do not call.
    """
    from flashinfer.autotuner import get_autotune_process_group

    if session.group is not None:
        return session.group
    return (get_autotune_process_group() or engine_group()) if tuning else None


def _found(
    session: Session, call: TunerCall, op: MoEOp, regime: Regime, rows: Sequence[int], ranks: Exchange | None
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Returns FlashInfer's tactics of the buckets `rows`: those that the store answers, and those that are measured."""
    if ranks is not None and session.strategy is RankStrategy.BROADCAST:
        return from_first(lambda: _found(session, call, op, regime, rows, None), ranks)
    answers = together(lambda: _answers(session, call, op, regime), ranks)
    served = _served(session, call, answers, rows, ranks)
    missing = [bucket for bucket in rows if bucket not in served]
    if not missing or not call.tuner.is_tuning_mode:
        return served, {}
    choices = OpTune(session, call, Dummies(session.layer, answers.regime, op, call), ranks).choices(missing)
    if choices and writes(answers.store, ranks) and (problem := answers.save(choices)):
        session.logger.warning("moetune: %s", problem)
    return served, tactics_of(choices)


def _served(
    session: Session, call: TunerCall, answers: Answers, rows: Sequence[int], ranks: Exchange | None
) -> dict[int, Any]:
    """Returns FlashInfer's tactics of those of the buckets `rows` that the store answers.

    A bucket is served only if every rank has stored the same tactic for it. So one that only some ranks have stored is
    measured again, on all of them.
    """
    try:
        stored = _stored(call, answers, rows)
    except Exception as error:  # the other ranks wait for what this one has stored
        session.logger.warning("moetune: the store is not read: %s", reason_of(error))
        stored = {}
    everywhere = gather({bucket: choice.tactic for bucket, choice in stored.items()}, ranks)
    return {
        bucket: native_of(choice.tactic)
        for bucket, choice in stored.items()
        if all(theirs.get(bucket) == choice.tactic for theirs in everywhere)
    }


def _stored(call: TunerCall, answers: Answers, rows: Sequence[int]) -> dict[int, Choice]:
    """Returns those of the buckets `rows` for which the store has a choice."""
    stored = {bucket: choice for bucket, choice in answers.load().items() if bucket in rows}
    if unknown := [bucket for bucket in rows if bucket not in stored]:
        stored |= offline_choices(answers, {bucket: call.keys[bucket].file_key for bucket in unknown})
    return stored
