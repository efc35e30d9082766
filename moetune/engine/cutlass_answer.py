"""Answers the tuner's calls of `cutlass_fused_moe`, which moetune's own backend tunes."""

from __future__ import annotations

from collections.abc import Sequence

from moetune.engine.exchange import Exchange
from moetune.engine.flashinfer_ops import MoEOp
from moetune.engine.placing import place
from moetune.engine.ranks import from_first
from moetune.engine.session import Session
from moetune.engine.tuner_call import TunerCall
from moetune.errors import MissError, MoetuneError
from moetune.spec.regime import Regime
from moetune.store.profile import Profile


def fill_cutlass(
    session: Session, call: TunerCall, op: MoEOp, regime: Regime, rows: Sequence[int], ranks: Exchange | None
) -> None:
    """Places the choices of `cutlass_fused_moe`, whose tuner call has no routing among its inputs.

    The first rank tunes the op with moetune's own backend, for all ranks.
    """
    is_tuned = session.profiles.get((regime.digest, True)) is not None
    asked = (regime.digest, is_tuned or bool(call.tuner.is_tuning_mode))
    if asked not in session.profiles:
        found = from_first(lambda: _cutlass_profile(session, call, op, regime), ranks)
        session.profiles[asked] = _counted(session, op, found)
    profile = session.profiles[asked]
    if profile is None:
        return
    which = "gemm1" if op.name.endswith("gemm1") else "gemm2"
    for choice in profile.choices:
        if choice.rows in rows:
            place(session, call, choice.rows, int(choice.tactic[which]))


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
