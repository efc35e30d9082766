"""`MoetuneTuner`: FlashInfer's `AutoTuner` that answers the current session's ops by its regime.

Importing this module imports FlashInfer, in a version that `flashinfer_versions` knows. Ops that do not compute the
session's layer, and calls in a context without a session, pass through unchanged.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

from flashinfer.autotuner.autotuner import AutoTuner

from moetune.engine import session as sessions
from moetune.engine.answer import OPS, answer
from moetune.engine.hits import count
from moetune.engine.tuner_cache import PlainCache, cache_class
from moetune.engine.tuner_call import TunerCall

_CACHE: Final = cache_class(AutoTuner)


@dataclasses.dataclass(eq=False)
class Recording:
    """One sweep of FlashInfer.

    `missing`: keys that are not found in the cache. `milliseconds`: the (tactic, time) pairs by rows.
    """

    missing: frozenset[Any]
    rows_of: Callable[[Any], int]
    milliseconds: dict[int, list[tuple[Any, float]]] = dataclasses.field(default_factory=dict)


_recording: ContextVar[Recording | None] = ContextVar("moetune_recording", default=None)


class MoetuneTuner(AutoTuner):  # type: ignore[misc]
    """`AutoTuner` that answers the current session's ops by its regime."""

    _found: Any = None
    """The optimization profile of the entry that the last search found. An entry that moetune placed has its own."""

    def choose_one(self, custom_op: str, runners: Any, tuning_config: Any, inputs: Any, **kwargs: Any) -> Any:
        """See `AutoTuner`; the cache is filled with the session's answer first."""
        session = sessions.current()
        if session is not None and len(runners) == 1 and custom_op not in self._effective_skip_ops:
            call = TunerCall(self, custom_op, runners[0], tuning_config, inputs, kwargs)
            with self._lock:
                began = time.perf_counter()
                answer(session, call)
                session.spent_s += time.perf_counter() - began
                chosen = super().choose_one(custom_op, runners, tuning_config, inputs, **kwargs)
                if not session.is_warm and custom_op.startswith(OPS):
                    count(session, call, self._found)
                return chosen
        return super().choose_one(custom_op, runners, tuning_config, inputs, **kwargs)

    def search_cache(
        self, custom_op: str, runners: Any, input_shapes: Any, tuning_config: Any, inputs: Any = None, **kwargs: Any
    ) -> Any:
        """See `AutoTuner`; during a recording, the missing keys are not found. The last profile found is kept."""
        recording = _recording.get()
        if recording is not None:
            extras = runners[0].get_cache_key_extras(inputs) if inputs is not None else ()
            if self._get_cache_key(custom_op, runners[0], input_shapes, tuning_config, extras) in recording.missing:
                return False, 0, -1, None
        found = super().search_cache(custom_op, runners, input_shapes, tuning_config, inputs, **kwargs)
        self._found = found[3]  # `choose_one` searches for the rows of its call last
        return found

    def _profile_single_kernel(self, runner: Any, inputs: Any, tactic: Any, *args: Any, **kwargs: Any) -> float:
        """See `AutoTuner`; during a recording, the time is recorded."""
        time_ms = float(super()._profile_single_kernel(runner, inputs, tactic, *args, **kwargs))
        recording = _recording.get()
        if recording is not None:
            recording.milliseconds.setdefault(recording.rows_of(inputs), []).append((tactic, time_ms))
        return time_ms

    @property
    def choices(self) -> PlainCache:
        """The tactics chosen so far, as this version of FlashInfer keeps them."""
        return _CACHE(self)

    def swept(
        self, call: TunerCall, missing: frozenset[Any], hook: Callable[[list[Any]], list[Any]]
    ) -> dict[int, list[tuple[Any, float]]]:
        """Lets FlashInfer time every tactic of `call` for the missing keys. Returns (tactic, time in ms) by rows.

        Args:
            call: the call of `choose_one`.
            missing: FlashInfer's keys of the buckets that are timed.
            hook: replaces the routing in a bucket's inputs. An `inputs_pre_hook` of the call runs before it.
        """
        recording = Recording(missing, call.rows_of)
        config = dataclasses.replace(call.config, inputs_pre_hook=_chained(call.config.inputs_pre_hook, hook))
        token = _recording.set(recording)
        try:
            super().choose_one(call.op, [call.runner], config, call.inputs, **call.arguments)
        finally:
            _recording.reset(token)
        return recording.milliseconds


def _chained(
    first: Callable[[list[Any]], list[Any]] | None, then: Callable[[list[Any]], list[Any]]
) -> Callable[[list[Any]], list[Any]]:
    return then if first is None else lambda tensors: then(list(first(tensors)))
