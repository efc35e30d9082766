"""Answers the tuner's calls of `cutlass_fused_moe`, which moetune's own backend tunes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetune.engine.exchange import Exchange
from moetune.engine.flashinfer_ops import MoEOp
from moetune.engine.placing import place
from moetune.engine.ranks import from_first
from moetune.engine.session import Session
from moetune.engine.strategy import RankStrategy
from moetune.engine.tuner_call import TunerCall
from moetune.errors import LostRankError, MissError, MoetuneError
from moetune.spec.regime import Regime
from moetune.store.profile import Profile

if TYPE_CHECKING:
    from moetune.backends.base import Backend


def fill_cutlass(
    session: Session, call: TunerCall, op: MoEOp, regime: Regime, rows: Sequence[int], ranks: Exchange | None
) -> None:
    """Places the choices of `cutlass_fused_moe`, whose tuner call has no routing among its inputs.

    The first rank looks them up or tunes the op with moetune's own backend, for all ranks. With `merge` and `parallel`
    all ranks take the times.
    """
    question = regime.digest, op.options
    is_tuned = session.profiles.get((*question, True)) is not None
    asked = (*question, is_tuned or bool(call.tuner.is_tuning_mode))
    if asked not in session.profiles:
        found = _found(session, call, op, regime, ranks)
        session.profiles[asked] = None if found is None else _counted(session, op, *found)
    profile = session.profiles[asked]
    if profile is None:
        return
    which = "gemm1" if op.name.endswith("gemm1") else "gemm2"
    for choice in profile.choices:
        if choice.rows in rows:
            place(session, call, choice.rows, int(choice.tactic[which]))


def _found(
    session: Session, call: TunerCall, op: MoEOp, regime: Regime, ranks: Exchange | None
) -> tuple[str, set[int]] | None:
    """Returns a profile as JSON and the buckets that were measured for it; None, logged, if there is none.

    Raises:
        LostRankError: a rank is missing.
    """
    try:
        if not call.tuner.is_tuning_mode:
            return from_first(lambda: _loaded(session, call, op, regime), ranks)
        if ranks is None or session.strategy is RankStrategy.BROADCAST:
            return from_first(lambda: _tuned(session, call, op, regime), ranks)
        return _tuned_together(session, call, op, regime, ranks)
    except LostRankError:
        raise
    except MoetuneError as error:
        session.logger.warning("moetune: %s is left to FlashInfer: %s", op.name, error)
    except Exception as error:  # an engine must start, whatever fails while it tunes
        session.logger.warning("moetune: %s is left to FlashInfer: %s: %s", op.name, type(error).__name__, error)
    return None


def _loaded(session: Session, call: TunerCall, op: MoEOp, regime: Regime) -> tuple[str, set[int]] | None:
    """Returns the stored profile as JSON, or None."""
    from moetune.tuning.tune import load

    try:
        profile = load(session.layer, regime, _backend(op), session.store, device=call.device())
    except MissError as error:  # `_log_miss` says what to do
        session.logger.debug("moetune: %s: %s", op.name, error)
        return None
    return profile.model_dump_json(), set()


def _tuned(session: Session, call: TunerCall, op: MoEOp, regime: Regime, **options: Any) -> tuple[str, set[int]]:
    """Returns the tuned profile as JSON and the buckets that were measured for it. `options` are those of `tune`."""
    from moetune.tuning.events import BucketChosen
    from moetune.tuning.tune import tune

    tuned: set[int] = set()

    def note(event: object) -> None:
        if isinstance(event, BucketChosen):
            tuned.add(event.choice.rows)

    question = (session.layer, regime, _backend(op), session.store)
    profile = tune(*question, device=call.device(), isolate=False, on_event=note, **options)
    return profile.model_dump_json(), tuned


def _backend(op: MoEOp) -> str | Backend:
    """Returns the backend by which the op is tuned, by its name if it has its default options."""
    from moetune.backends import registry

    return registry.backend(op.backend, **dict(op.options)) if op.options else op.backend


def _tuned_together(
    session: Session, call: TunerCall, op: MoEOp, regime: Regime, ranks: Exchange
) -> tuple[str, set[int]]:
    """Returns what `_tuned` returns on the first rank. All ranks take the times."""
    from moetune.backends import registry
    from moetune.engine.shared_bench import tuned_together
    from moetune.measure.worker import open_benches

    return tuned_together(
        lambda shared: _tuned(session, call, op, regime, open_benches=shared),
        open_benches,
        registry.backend(op.backend, **dict(op.options)),
        call.device(),
        ranks,
    )


def _counted(session: Session, op: MoEOp, text: str, tuned: set[int]) -> Profile:
    """Returns the profile that is given as JSON. Its buckets are counted; `tuned` are those that were measured."""
    profile = Profile.model_validate_json(text)
    session.count(
        op.backend, tuned=tuned, served=[choice.rows for choice in profile.choices if choice.rows not in tuned]
    )
    return profile
