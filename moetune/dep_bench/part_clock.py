"""Defines what a clock of parts is, and `HostClock`, which times by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

Mark = Callable[[str], None]
"""Is called where a part ends, with the part's name."""
MarkedCall = Callable[[Mark], object]
"""Runs something in parts, and calls its argument at the end of each part."""
Parts = dict[str, float]
"""The time of each part in µs, in the order in which they ended. A part that ended twice has the sum."""


class Take(Protocol):
    """One call that can be timed again and again."""

    def start(self) -> None:
        """Runs the call once. It may return before the device has finished."""
        ...

    def read(self) -> Parts:
        """Returns the times of the last run, after it has finished."""
        ...


class PartClock(Protocol):
    """Makes takes of calls.

    Attributes:
        eager: why the last takes are timed without CUDA graphs, launch overhead included; empty if they are not.
    """

    eager: str

    def takes(self, calls: Sequence[MarkedCall], *, static: bool) -> Sequence[Take]:
        """Returns a take of each call: all of them in CUDA graphs or none, so that their times can be compared.

        Args:
            calls: the calls.
            static: whether a CUDA graph can capture them.
        """
        ...


class HostClock:
    """Times by the host's clock.

    Args:
        before: runs before each call, untimed.
        now_ns: returns the current time in ns.
    """

    eager = ""

    def __init__(self, before: Callable[[], object], now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._before, self._now_ns = before, now_ns

    def takes(self, calls: Sequence[MarkedCall], *, static: bool) -> Sequence[Take]:
        """See `PartClock`."""
        return [_HostTake(call, self._before, self._now_ns) for call in calls]


class _HostTake:
    def __init__(self, call: MarkedCall, before: Callable[[], object], now_ns: Callable[[], int]) -> None:
        self._call, self._before, self._now_ns = call, before, now_ns
        self._parts: Parts = {}

    def start(self) -> None:
        self._before()
        self._parts = {}
        began = self._now_ns()

        def mark(part: str) -> None:
            nonlocal began
            ended = self._now_ns()
            self._parts[part] = self._parts.get(part, 0.0) + (ended - began) / 1e3
            began = self._now_ns()

        self._call(mark)

    def read(self) -> Parts:
        return self._parts
