"""`MoetuneTuner`: FlashInfer's `AutoTuner` that answers the current session's ops by its regime.

Importing this module imports FlashInfer, in a version that `flashinfer_versions` knows. Ops that do not compute the
session's layer, and calls in a context without a session, pass through unchanged.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

import torch
from flashinfer.autotuner import get_autotune_process_group, set_autotune_process_group
from flashinfer.autotuner.autotuner import AutoTuner

from moetune.engine import session as sessions
from moetune.engine.answer import OPS, answer
from moetune.engine.hits import count
from moetune.engine.sweep import Sweep
from moetune.engine.tuner_cache import PlainCache, cache_class
from moetune.engine.tuner_call import TunerCall
from moetune.measure.reasons import is_out_of_memory

_CACHE: Final = cache_class(AutoTuner)


@dataclasses.dataclass(eq=False)
class Recording:
    """One sweep of FlashInfer.

    `missing`: the keys that are timed. `sweep`: what was timed. `share`: this rank's number and the number of ranks
    that share the tactics. `offered`: how many tactics FlashInfer has offered, by rows.
    """

    missing: frozenset[Any]
    rows_of: Callable[[Any], int]
    share: tuple[int, int]
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    offered: Counter[int] = dataclasses.field(default_factory=Counter)

    def time(self, inputs: Any, tactic: Any, profile: Callable[[], float]) -> float:
        """Returns what `profile` returns, and records it; infinity for another rank's tactic or one without memory."""
        rows = self.rows_of(inputs)
        number, (mine, ranks) = self.offered[rows], self.share
        self.offered[rows] += 1
        if number % ranks != mine:
            return math.inf
        try:
            time_ms = float(profile())
        except Exception as error:
            self.sweep.failed(rows, tactic, error)
            if not is_out_of_memory(error):
                raise
            with suppress(Exception):
                torch.cuda.empty_cache()
            return math.inf  # FlashInfer would end the whole sweep
        self.sweep.timed(rows, tactic, time_ms)
        return time_ms


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
        """See `AutoTuner`; a recording finds all keys but the missing ones. The last profile found is kept."""
        recording = _recording.get()
        if recording is not None:
            extras = runners[0].get_cache_key_extras(inputs) if inputs is not None else ()
            key = self._get_cache_key(custom_op, runners[0], input_shapes, tuning_config, extras)
            return key not in recording.missing, 0, -1, None
        found = super().search_cache(custom_op, runners, input_shapes, tuning_config, inputs, **kwargs)
        self._found = found[3]  # `choose_one` searches for the rows of its call last
        return found

    def _profile_single_kernel(self, runner: Any, inputs: Any, tactic: Any, *args: Any, **kwargs: Any) -> float:
        """See `AutoTuner`; during a recording, the time is recorded."""
        profile = partial(super()._profile_single_kernel, runner, inputs, tactic, *args, **kwargs)
        recording = _recording.get()
        return float(profile()) if recording is None else recording.time(inputs, tactic, profile)

    @property
    def choices(self) -> PlainCache:
        """The tactics chosen so far, as this version of FlashInfer keeps them."""
        return _CACHE(self)

    def swept(
        self,
        call: TunerCall,
        missing: frozenset[Any],
        hook: Callable[[list[Any]], list[Any]],
        share: tuple[int, int] = (0, 1),
    ) -> Sweep:
        """Lets FlashInfer time the tactics of `call` for the missing keys, on this rank alone.

        FlashInfer's own process group is unset meanwhile: it would make each tactic's time the mean of all ranks, and
        wait for a rank that has ended.

        Args:
            call: the call of `choose_one`.
            missing: FlashInfer's keys of the buckets that are timed.
            hook: replaces the routing in a bucket's inputs. An `inputs_pre_hook` of the call runs before it.
            share: (i, n): of each bucket's tactics, those with the numbers i, i + n, i + 2 n … are timed.
        """
        recording = Recording(missing, call.rows_of, share)
        config = dataclasses.replace(call.config, inputs_pre_hook=_chained(call.config.inputs_pre_hook, hook))
        token, group = _recording.set(recording), get_autotune_process_group()
        set_autotune_process_group(None)
        try:
            super().choose_one(call.op, [call.runner], config, call.inputs, **call.arguments)
        finally:
            set_autotune_process_group(group)
            _recording.reset(token)
        return recording.sweep


def _chained(
    first: Callable[[list[Any]], list[Any]] | None, then: Callable[[list[Any]], list[Any]]
) -> Callable[[list[Any]], list[Any]]:
    return then if first is None else lambda tensors: then(list(first(tensors)))
