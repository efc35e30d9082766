"""Places tactics in FlashInfer's cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moetune.engine.session import Session
from moetune.engine.tuner_call import TunerCall
from moetune.spec.tactic import UNTUNED


def place(session: Session, call: TunerCall, rows: int, tactic: Any) -> None:
    """Makes `tactic`, one of FlashInfer's, the one of a bucket of `call`."""
    key, profile = call.keys[rows], call.profiles[rows]
    call.tuner.choices.place(key, tactic, profile, call.effective_config)
    session.placed[key] = (tactic, profile)
    session.placed_profiles[id(profile)] = profile
    if call.tuner.is_tuning_mode:
        session.agreed.add(key)


def place_again(session: Session, call: TunerCall, keys: Iterable[Any]) -> None:
    """Places those of the session's tactics that FlashInfer's cache no longer holds."""
    choices = call.tuner.choices
    for key in keys:
        tactic, profile = session.placed[key]
        if not choices.holds(key, tactic):
            choices.place(key, tactic, profile, call.effective_config)


def place_defaults(session: Session, call: TunerCall, buckets: Iterable[int]) -> None:
    """Makes FlashInfer's default the tactic of those of the buckets, given by rows, that the ranks did not agree on.

    FlashInfer then sweeps none of them. They count as missed.
    """
    choices = call.tuner.choices
    for rows in buckets:
        key = call.keys[rows]
        if key not in session.agreed and not choices.holds(key, UNTUNED):
            session.placed.pop(key, None)
            choices.place(key, UNTUNED, call.profiles[rows], call.effective_config)
