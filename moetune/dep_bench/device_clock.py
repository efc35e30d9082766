"""Times the parts of a call by CUDA events inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from moetune.dep_bench.part_clock import HostClock, MarkedCall, PartClock, Parts, Take
from moetune.dep_bench.process_group import Ranks
from moetune.measure.capture import captured_in
from moetune.measure.reasons import is_out_of_memory

if TYPE_CHECKING:
    import torch


class DeviceClock:
    """Times by CUDA events. The L2 cache is overwritten before each call, and then all ranks begin together.

    Static calls are captured in CUDA graphs, as engines do. A call has to have run once before.

    Args:
        ranks: the ranks.
        before: runs before each call, untimed; it is captured with it.
    """

    def __init__(self, ranks: Ranks, before: Callable[[], object]) -> None:
        import torch

        self.eager = ""
        self._ranks, self._before = ranks, before
        self._device = torch.device(ranks.device)
        l2_bytes = torch.cuda.get_device_properties(self._device).L2_cache_size
        self._flush = torch.empty(2 * max(l2_bytes, 1 << 20), dtype=torch.int8, device=self._device)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        before()  # what is set up at its first call cannot be captured

    def takes(self, calls: Sequence[MarkedCall], *, static: bool) -> Sequence[Take]:
        """See `PartClock`. It is a collective. If any rank cannot capture one of the calls, no rank uses a graph."""
        self.eager = "" if static else "its shapes depend on the routing"
        graphs: list[_GraphTake] = []
        for call in calls:
            if not self.eager:
                self.eager = self._capture(call, graphs)
        return [_EagerTake(self, call) for call in calls] if self.eager else graphs

    def _capture(self, call: MarkedCall, graphs: list[_GraphTake]) -> str:
        """Adds the graph of a call. Returns why a rank has none, the same on all ranks; empty if all have one.

        Raises:
            RuntimeError: this rank has no memory for it.
            RankError: another rank has none.
        """

        def reason() -> str:
            try:
                graphs.append(_GraphTake(self, call))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                return str(error).splitlines()[0]
            return ""

        reasons = self._ranks.gather(self._ranks.together(reason))
        return next((found for found in reasons if found), "")

    def enqueue(self, call: MarkedCall, external: bool) -> list[tuple[str, torch.cuda.Event]]:
        """Launches the call once. Returns an event for its beginning, and one for the end of each part."""
        self._flush.zero_()
        self._before()
        events = [("", self._recorded(external))]
        call(lambda part: events.append((part, self._recorded(external))))
        return events

    def captured(self, call: MarkedCall) -> tuple[torch.cuda.CUDAGraph, list[tuple[str, torch.cuda.Event]]]:
        """Returns a graph of the call, and its events.

        Raises:
            RuntimeError: it cannot be captured.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with captured_in(graph, self._stream, self._pool):
            events = self.enqueue(call, external=True)
        return graph, events

    @staticmethod
    def _recorded(external: bool) -> torch.cuda.Event:
        import torch

        made: torch.cuda.Event = torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
        made.record()
        return made


class _GraphTake:
    def __init__(self, clock: DeviceClock, call: MarkedCall) -> None:
        self._graph, self._events = clock.captured(call)

    def start(self) -> None:
        self._graph.replay()

    def read(self) -> Parts:
        return _elapsed(self._events)


class _EagerTake:
    def __init__(self, clock: DeviceClock, call: MarkedCall) -> None:
        self._clock, self._call = clock, call
        self._events: list[tuple[str, torch.cuda.Event]] = []

    def start(self) -> None:
        self._events = self._clock.enqueue(self._call, external=False)

    def read(self) -> Parts:
        return _elapsed(self._events)


def _elapsed(events: list[tuple[str, torch.cuda.Event]]) -> Parts:
    import torch

    torch.cuda.synchronize()  # an event of a graph says only then when it was recorded
    parts: Parts = {}
    for (_, begin), (part, end) in pairwise(events):
        parts[part] = parts.get(part, 0.0) + 1e3 * begin.elapsed_time(end)
    return parts


def clock_for(ranks: Ranks, before: Callable[[], object]) -> PartClock:
    """Returns the clock of the ranks' device."""
    return HostClock(before) if ranks.device == "cpu" else DeviceClock(ranks, before)
