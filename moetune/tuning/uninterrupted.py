"""`uninterrupted` defers Ctrl-C while a result is saved, so that it is not lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a process to end."""
SAME_S = 0.2
"""Signals this close to the first are the same request. A shell and its terminal both send one, for instance."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers the signals that have a handler in Python until the end of the block. A second one is not deferred.

    So an ordinary save is finished, and one that waits for a lock can be ended. In other threads than the main one
    nothing is deferred: Python runs handlers in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in ENDING if callable(handler := signal.getsignal(number))}
    deferred: list[tuple[int, float]] = []

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def defer(number: int, frame: FrameType | None) -> None:
        if not deferred:
            deferred.append((number, time.monotonic()))
        elif time.monotonic() - deferred[0][1] > SAME_S:
            deferred.clear()
            restore()
            signal.raise_signal(number)

    try:
        for number in handlers:
            signal.signal(number, defer)
        yield
    finally:
        restore()
        if deferred:
            signal.raise_signal(deferred[0][0])
