"""Counts the calls of FlashInfer's MoE ops that run a tactic of moetune, by shape, until the engine's warm-up ends."""

from __future__ import annotations

from typing import Any

from moetune.engine.flashinfer_ops import CUTLASS_OPS
from moetune.engine.session import AskedShape, Session
from moetune.engine.tuner_call import TunerCall


def count(session: Session, call: TunerCall, found: Any) -> None:
    """Counts a call. It is a hit if FlashInfer took its tactic from an entry that the session placed.

    It raises nothing. After an error nothing more is counted.

    Args:
        session: the session.
        call: the call.
        found: the optimization profile of the entry that FlashInfer found for the call's rows, or None.
    """
    try:
        shape = session.asked_ops.get(call.identity)
        if shape is None:
            shape = session.asked_ops[call.identity] = AskedShape(_name(call))
            session.asked.append(shape)
        if id(found) in session.placed_profiles:
            shape.hits += 1
        else:
            shape.misses += 1
    except Exception as error:  # the engine must go on
        session.is_warm = True
        session.logger.debug("moetune: hits are no longer counted: %s: %s", type(error).__name__, error)


def _name(call: TunerCall) -> str:
    """Returns the op and the number of its experts, for the log."""
    experts = getattr(call.runner, "num_local_experts", None)
    if experts is None and call.op in CUTLASS_OPS:
        experts = call.inputs[1].shape[0]
    return f"FlashInfer {call.op}" + ("" if experts is None else f" E={experts}")
