"""FlashInfer's own tuner, asked moetune's question: a subclass of its `AutoTuner`, put over the living instance.

Ops that are not the question's, contexts without a question and everything outside tuning pass through untouched.
Written against flashinfer-python's `autotuner` of the versions in `flashinfer_versions`; of any other nothing is
touched.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from moetune.engine import session as sessions
from moetune.engine.answer import answer
from moetune.engine.tuner_call import TunerCall

_recording: ContextVar[Recording | None] = ContextVar("moetune_recording", default=None)
_lock = threading.Lock()
_users = 0


@dataclasses.dataclass(eq=False)
class Recording:
    """A sweep in progress. Its `missing` keys are answered from no cache; (tactic, time in ms) are noted by rows."""

    missing: frozenset[Any]
    rows_of: Callable[[Any], int]
    milliseconds: dict[int, list[tuple[Any, float]]] = dataclasses.field(default_factory=dict)


@functools.cache
def tuner_class() -> Any:
    """The subclass of the installed FlashInfer's `AutoTuner`."""
    from flashinfer.autotuner.autotuner import AutoTuner, _tactic_to_json

    class MoetuneTuner(AutoTuner):  # type: ignore[misc]
        """`AutoTuner` that answers the current session's ops by its regime."""

        def choose_one(self, custom_op: str, runners: Any, tuning_config: Any, inputs: Any, **kwargs: Any) -> Any:
            """See `AutoTuner`."""
            asked = sessions.current()
            if asked is not None and len(runners) == 1 and custom_op not in self._effective_skip_ops:
                call = TunerCall(self, custom_op, runners[0], tuning_config, inputs, kwargs)
                with self._lock:
                    answer(asked, call)
            return super().choose_one(custom_op, runners, tuning_config, inputs, **kwargs)

        def search_cache(
            self, custom_op: str, runners: Any, input_shapes: Any, tuning_config: Any, inputs: Any = None, **kw: Any
        ) -> Any:
            """See `AutoTuner`; nothing is found for the keys that are being tuned."""
            recording = _recording.get()
            if recording is not None:
                extras = runners[0].get_cache_key_extras(inputs) if inputs is not None else ()
                if self._get_cache_key(custom_op, runners[0], input_shapes, tuning_config, extras) in recording.missing:
                    return False, 0, -1, None
            return super().search_cache(custom_op, runners, input_shapes, tuning_config, inputs, **kw)

        def _profile_single_kernel(self, runner: Any, inputs: Any, tactic: Any, *args: Any, **kwargs: Any) -> float:
            """See `AutoTuner`; the time is noted."""
            time_ms = float(super()._profile_single_kernel(runner, inputs, tactic, *args, **kwargs))
            recording = _recording.get()
            if recording is not None:
                recording.milliseconds.setdefault(recording.rows_of(inputs), []).append((tactic, time_ms))
            return time_ms

        def profiled(
            self, call: TunerCall, missing: frozenset[Any], hook: Callable[[list[Any]], list[Any]]
        ) -> dict[int, list[tuple[Any, float]]]:
            """FlashInfer's own sweep over the missing keys with `hook`'s inputs: (tactic, time in ms) by rows."""
            recording = Recording(missing, call.rows_of)
            config = dataclasses.replace(call.config, inputs_pre_hook=_chained(call.config.inputs_pre_hook, hook))
            token = _recording.set(recording)
            try:
                super().choose_one(call.op, [call.runner], config, call.inputs, **call.arguments)
            finally:
                _recording.reset(token)
            return recording.milliseconds

        def place(self, key: Any, tactic: Any, profile: Any, config: Any) -> None:
            """Puts an answer where `AutoTuner` itself looks first, saves from, and, under autotune_v2, publishes."""
            winners = self._winner_cache() if hasattr(self, "_winner_cache") else self.profiling_cache
            winners[key] = (tactic, profile)
            self._dirty = True
            self._dirty_seq += 1
            if not hasattr(self, "_profiling_cache_policies"):
                return
            policy = self._profiling_policy(config)  # from 0.7.0 an entry names how it was measured
            partitioned = hasattr(self, "_winner_cache_identity")  # from 0.7.1 beside its partition, and on disk
            self._profiling_cache_policies[(self._winner_cache_identity(), key) if partitioned else key] = policy
            store = self._active_managed_store
            if store is not None:  # or its reload would bring back the winner of FlashInfer's sweep
                named = {"profiling_policy": policy} if partitioned else {}
                fields = key.key_fields
                store.publish(key.file_key, key.runner_class_name, _tactic_to_json(tactic), key_fields=fields, **named)
                self._managed_decoded.pop((str(store.root), store.env_hash, fields), None)

        def holds(self, key: Any, tactic: Any) -> bool:
            """Whether the entry is still the one that was placed."""
            winners = self._winner_cache() if hasattr(self, "_winner_cache") else self.profiling_cache
            return key in winners and winners[key][0] == tactic

        def effective(self, config: Any) -> Any:
            """`config` as `choose_one` is going to see it: with the buckets and policy of this thread's contexts."""
            if self._override_tuning_buckets is not None or self._override_round_up:
                config = self._apply_tuning_overrides(config)
            policy = getattr(self, "_effective_measure_policy", None)
            return config if policy is None else self._apply_measure_policy(config, policy)

    return MoetuneTuner


def _chained(
    first: Callable[[list[Any]], list[Any]] | None, then: Callable[[list[Any]], list[Any]]
) -> Callable[[list[Any]], list[Any]]:
    """A hook that was there runs first: what it prepares stays, only the routing is replaced."""
    return then if first is None else lambda tensors: then(list(first(tensors)))


@contextmanager
def installed() -> Iterator[None]:
    """FlashInfer's tuner is moetune's subclass while any such context is open, in any thread."""
    global _users
    from flashinfer.autotuner.autotuner import AutoTuner

    tuner = AutoTuner.get()
    with _lock:
        _users += 1
        tuner.__class__ = tuner_class()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                tuner.__class__ = AutoTuner


def install_for_process() -> None:
    """FlashInfer's tuner is moetune's subclass from now on; it need not be made yet. May be called again."""
    global _users
    from flashinfer.autotuner.autotuner import AutoTuner

    with _lock:
        _users += 1
        if AutoTuner._instance is not None:
            AutoTuner._instance.__class__ = tuner_class()
        else:
            # made when an op first asks for it: making it asks CUDA, which a process must not do before it forks
            AutoTuner.__new__ = lambda cls, *args, **kwargs: object.__new__(tuner_class())
