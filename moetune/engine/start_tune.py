"""Tunes what the store lacks for the Triton experts of a starting engine, if `MOETUNE_TUNE_AT_START` is set.

The engine's first look-up of the layer's shape waits for it. In vLLM that is in the profiling run of a worker's start,
before the KV cache is allocated (`determine_available_memory` of `v1/worker/gpu_worker.py`, 0.26.0 and 0.33.0); in
SGLang 0.5.23 it is in the eager run before the first CUDA graph, after the KV cache.

All of it runs in a process of its own, which is killed when its time ends. So a crash, a hang or too little memory
costs no more than the time, no CUDA call is made in the engine's process, and what is allocated meanwhile is not
counted in the engine's own peak, from which vLLM sizes its KV cache.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, Final

from moetune.engine.ranks import first_answer
from moetune.errors import MoetuneError, UsageError
from moetune.measure.child import Channel, Child, ChildDiedError
from moetune.measure.reasons import shortened
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.tuning.refine import missing_buckets

VARIABLE: Final = "MOETUNE_TUNE_AT_START"
LIMITS_S: Final = (10.0, 300.0)
"""The fewest and the most seconds. vLLM waits 600 s for its engine, and torch as long for a collective."""
SHARE: Final = 0.8
"""The share of the time in which buckets may begin. The last one, and the start of the process, need the rest."""
GRACE_S: Final = 90.0
"""How much longer the other ranks wait. `Child` may take 60 s to end a process whose GPU runs a kernel."""
Found = tuple[Profile | None, str]
"""A profile, and what the log says of it."""


def seconds() -> float | None:
    """Returns how long an engine's start may tune, the value of `MOETUNE_TUNE_AT_START`; None if that is not set.

    Raises:
        UsageError: the value is not a number of seconds between `LIMITS_S`.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    least, most = LIMITS_S
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not least <= value <= most:
        raise UsageError(
            f"{VARIABLE}={given} is not a number of seconds from {least:g} to {most:g}.",
            "Set it to 180, for example, or unset it.",
        )
    return value


def obstacle() -> str | None:
    """Returns why the engine must not be kept waiting at this moment, or None."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "the engine has not set its device"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    return "a CUDA graph is being captured" if torch.cuda.is_current_stream_capturing() else None


def found(
    name: str, limit_s: float, look_up: Callable[[], tuple[Profile, str] | None], tune: Callable[[], str | None]
) -> Found:
    """Returns the profile that all ranks of an engine use, and tunes what it lacks.

    The first rank that asks looks it up and tunes; the others take its answer. A rank that gets none in time uses what
    its own store has.

    Args:
        name: names the question. It is the same on all ranks.
        limit_s: how long `tune` may take.
        look_up: returns the stored profile and what the log says of it, or None.
        tune: tunes the missing buckets into the store and returns why not all of them, or None.
    """
    text = first_answer(name, lambda: _answer(look_up, tune), limit_s + GRACE_S)
    if text is None:
        profile, note = look_up() or (None, "")
        return profile, f"{note} (the rank that tunes has not answered)"
    stored, note = json.loads(text)
    return (None if stored is None else Profile.model_validate(stored)), note


def _answer(look_up: Callable[[], tuple[Profile, str] | None], tune: Callable[[], str | None]) -> str:
    """Returns the answer for all ranks as JSON: the profile or null, and what the log says of it."""
    stored = look_up()
    said = ""
    if stored is None or missing_buckets(stored[0].regime, stored[0]):
        begin = time.monotonic()
        reason = obstacle() or tune()
        said = (
            f" (not all tuned: {shortened(reason, 120)})" if reason else f" (tuned in {time.monotonic() - begin:.0f} s)"
        )
        stored = look_up()
    profile, note = stored or (None, "")
    return json.dumps([None if profile is None else profile.model_dump(mode="json"), note + said])


def tune_within(
    limit_s: float, layer: MoELayer, regime: Regime, backend: Any, store: str, device: str, rank: Any
) -> str | None:
    """Tunes the missing buckets in a process of its own. It raises nothing.

    Each bucket is stored once it is tuned, so what was tuned in time stays.

    Args:
        limit_s: after this time the process is killed.
        layer, regime, backend, device, rank: as in `tune`.
        store: the folder of the store, or several; see `Store`.

    Returns:
        Why not everything was tuned, or None.
    """
    end = time.monotonic() + limit_s
    try:
        with Child(_tune, layer, regime, backend, store, device, rank, limit_s * SHARE) as child:
            if not child.channel.connection.poll(max(0.0, end - time.monotonic())):
                return f"not finished within {limit_s:g} s"
            try:
                reason: str | None = child.channel.receive()
            except (EOFError, OSError):
                raise child.died() from None
            return reason
    except (MoetuneError, ChildDiedError, OSError) as error:
        return str(error)


def _tune(
    channel: Channel, layer: MoELayer, regime: Regime, backend: Any, store: str, device: str, rank: Any, budget_s: float
) -> None:
    """Runs in the process: sends None, or why not everything was tuned."""
    from moetune.tuning.events import BucketsSkipped
    from moetune.tuning.tune import tune

    skipped: list[int] = []

    def note(event: object) -> None:
        if isinstance(event, BucketsSkipped):
            skipped.extend(event.rows)

    try:
        tune(layer, regime, backend, store, device=device, rank=rank, time_budget_s=budget_s, on_event=note)
    except MoetuneError as error:
        channel.send(str(error))
    else:
        channel.send(f"the time ended before {len(skipped)} buckets" if skipped else None)
