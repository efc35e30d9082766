"""Replaces FlashInfer's `AutoTuner` by moetune's subclass of it, for a context or for the process.

FlashInfer has one instance of `AutoTuner` in a process. The class of that instance is replaced, so that every reference
to it stays valid.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0


def _subclass() -> type:
    """Returns `MoetuneTuner`. Its module imports FlashInfer, so it is imported only when it is needed."""
    from moetune.engine.tuner import MoetuneTuner

    return MoetuneTuner


@contextmanager
def installed() -> Iterator[None]:
    """Makes FlashInfer's tuner moetune's subclass as long as any such context is open, in any thread."""
    global _users
    from flashinfer.autotuner.autotuner import AutoTuner

    tuner = AutoTuner.get()
    with _lock:
        _users += 1
        tuner.__class__ = _subclass()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                tuner.__class__ = AutoTuner


def install_for_process() -> None:
    """Makes FlashInfer's tuner moetune's subclass from now on. May be called again.

    Where the tuner's instance does not exist yet, it is not created: creating it queries CUDA, which a process must not
    do before it forks. Then it is of the subclass when FlashInfer creates it.
    """
    global _users
    from flashinfer.autotuner.autotuner import AutoTuner

    with _lock:
        _users += 1
        if AutoTuner._instance is not None:
            AutoTuner._instance.__class__ = _subclass()
        else:
            AutoTuner.__new__ = lambda cls, *args, **kwargs: object.__new__(_subclass())
