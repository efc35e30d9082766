"""How time is taken: interleaved, paired, cold where the engine would be cold."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from moetune.measure.reasons import is_out_of_memory

if TYPE_CHECKING:
    import torch

    Events = dict[int, tuple[torch.cuda.Event, torch.cuda.Event]]

TimedCall = Callable[[int], object]
"""Runs one tactic on one draw and may return before the device is done."""

Before = Callable[[int, int], None]
"""Is told the position of a call that is about to run, and how often it will before the next is told."""


class Clock(Protocol):
    """Times calls side by side, so that whatever drifts, drifts for all of them.

    Attributes:
        eager: why calls of the last `paired_samples` were timed launch by launch on a GPU, by their position.
    """

    eager: dict[int, str]

    def warm_up(self, call: TimedCall, draw: int) -> None:
        """Runs `call` once, untimed, to the end: compiles, fills caches, raises what it raises."""
        ...

    def paired_samples(
        self, calls: Sequence[TimedCall], draws: Sequence[int], before: Before = lambda position, runs: None
    ) -> list[list[float]]:
        """Times every call once for each entry of `draws`, the calls in another order each time.

        Whatever is raised, the call that `before` was told last has raised it.

        Returns:
            [call][sample] in µs; sample i of every call was taken in one round, on `draws[i]`.
        """
        ...


INTERLEAVE_US = 2000.0
"""About how long a call may be timed before it is another's turn; longer where one execution takes longer.

On an H200 at its power limit (0.7 ms a call, 8 calls, 32 samples) the spread of a ratio over repetitions is 0.09 % so,
and 0.2 % with 4 ms; half of it again costs a third more time and gains nothing.
"""


SETTLE_US = 50_000.0
"""Where all timings together take longer than this, as much of them goes before, untimed.

After a pause of some milliseconds an H200 runs above its power limit for 40 to 70 ms, 5 to 10 % faster than later, and
another tactic may lead: of 24 timed once each (4.3 ms a call) times are off by 3.5 % (1 σ), of a GPU at its limit by
1.4 %.
"""


def clock_for(device: str) -> Clock:
    """The clock of a torch device's kind."""
    return CudaClock(device) if device.startswith("cuda") else CpuClock()


def order(count: int, turn: int) -> list[int]:
    """The positions 0 … count − 1 in the order of one turn of a Williams design (E. J. Williams, 1949).

    Over 2 · count turns every call stands twice at each place and follows each other call twice: what a call leaves
    behind, a cooler GPU or a fuller cache, helps or hurts all others alike.
    """
    cycle, start = divmod(turn, count) if count else (0, 0)
    ends_inwards = (step // 2 + 1 if step % 2 else -(step // 2) for step in range(count))
    line = [(start + position) % count for position in ends_inwards]
    return line[::-1] if cycle % 2 else line


class CpuClock:
    """Reads the time before and after each call, with the garbage collector paused.

    Args:
        now_ns: returns the time in ns.
    """

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now_ns = now_ns
        self.eager: dict[int, str] = {}

    def warm_up(self, call: TimedCall, draw: int) -> None:
        """See `Clock`."""
        call(draw)

    def paired_samples(
        self, calls: Sequence[TimedCall], draws: Sequence[int], before: Before = lambda position, runs: None
    ) -> list[list[float]]:
        """See `Clock`."""
        samples: list[list[float]] = [[] for _ in calls]
        with _no_garbage_collection():
            for turn, draw in enumerate(draws):
                for position in order(len(calls), turn):
                    call = calls[position]
                    before(position, 1)
                    begin = self._now_ns()
                    result = call(draw)
                    end = self._now_ns()
                    del result  # freeing it is not the call's time
                    samples[position].append((end - begin) / 1e3)
        return samples


class CudaClock:
    """CUDA events around each call, inside a CUDA graph, the L2 cache overwritten before each.

    A call is captured as graphs that walk over the draws, so weights and activations are as cold as between two layers
    of a model, and no launch overhead is timed. A call that cannot be captured (it waits for the device, as an engine
    running it would) is timed by events without a graph, launch overhead included.

    Args:
        device: the torch device.

    Attributes:
        eager: why calls of the last `paired_samples` could not be captured, by their position.
    """

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self._device = torch.device(device)
        l2_bytes = torch.cuda.get_device_properties(self._device).L2_cache_size
        self._flush = torch.empty(2 * max(l2_bytes, 1 << 20), dtype=torch.int8, device=self._device)
        # the default stream cannot be captured
        self._side_stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self.eager: dict[int, str] = {}

    def warm_up(self, call: TimedCall, draw: int) -> None:
        """See `Clock`."""
        import torch

        with torch.cuda.device(self._device):
            call(draw)
            torch.cuda.synchronize()

    def paired_samples(
        self, calls: Sequence[TimedCall], draws: Sequence[int], before: Before = lambda position, runs: None
    ) -> list[list[float]]:
        """See `Clock`. A draw named n times is sampled in n rounds.

        Calls alternate after every few draws, as many as take `INTERLEAVE_US`: a GPU at its power limit changes its
        clock within milliseconds, and what is compared must see the same. For that it must not rest either, so the next
        call is captured while this one runs.
        """
        import torch

        self.eager = {}
        if not draws or not calls:
            return [[] for _ in calls]
        rounds = max(Counter(draws).values())
        distinct = tuple(dict.fromkeys(draws))
        times: list[dict[int, list[float]]] = [{draw: [] for draw in distinct} for _ in calls]
        with torch.cuda.device(self._device), _no_garbage_collection():
            before(0, 1)
            once_us = self._once_us(calls[0], distinct[0])
            chunks = _chunks(distinct, once_us)
            steps = [
                (position, turn % len(chunks))
                for turn in range(rounds * len(chunks))
                for position in order(len(calls), turn)
            ]
            walks = _Walks(self._walk, calls, chunks, before)
            untimed_us = SETTLE_US if once_us * len(calls) * len(draws) > SETTLE_US else 0.0
            for step, following in pairwise(steps):
                if untimed_us <= 0:
                    break
                untimed_us -= sum(walks.times_us(step, following).values())
            for step, following in zip(steps, (*steps[1:], steps[0]), strict=True):
                for draw, sample in walks.times_us(step, following).items():
                    times[step[0]][draw].append(sample)
        return [_in_order(of_call, draws) for of_call in times]

    def _once_us(self, call: TimedCall, draw: int) -> float:
        """About how long a call takes, launch overhead included."""
        import torch

        begin, end = self._event(), self._event()
        begin.record()
        call(draw)
        end.record()
        torch.cuda.synchronize()
        return 1e3 * float(begin.elapsed_time(end))

    def _walk(self, call: TimedCall, position: int, draws: Sequence[int]) -> _Walk:
        """`call` on every draw, as a graph if it can be captured."""
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            events = self._events(draws, external=True)
            with self._capture(graph):
                self._enqueue(call, events)
        except RuntimeError as error:  # it synchronizes, which a capture cannot
            if is_out_of_memory(error):  # a time without a graph would compare with no other
                raise
            self.eager[position] = str(error).splitlines()[0]
            torch.cuda.synchronize()
            eager_events = self._events(draws, external=False)
            return _Walk(partial(self._enqueue, call, eager_events), eager_events)
        return _Walk(graph.replay, events)

    @contextmanager
    def _capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """`torch.cuda.graph` without its garbage collection and emptied cache, which cost tens of ms a capture."""
        import torch

        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            graph.capture_begin()
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # it says that the capture has failed, not why
                    graph.capture_end()
                raise
            graph.capture_end()

    def _events(self, draws: Sequence[int], external: bool) -> Events:
        return {draw: (self._event(external), self._event(external)) for draw in draws}

    @staticmethod
    def _event(external: bool = False) -> torch.cuda.Event:
        import torch

        made: torch.cuda.Event = torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
        return made

    def _enqueue(self, call: TimedCall, events: Events) -> None:
        for draw, (begin, end) in events.items():
            self._flush.zero_()
            begin.record()
            call(draw)
            end.record()


@dataclass(frozen=True, slots=True)
class _Walk:
    """One call on several draws: `start` has the device do them, and `wait` for it returns the µs of each."""

    start: Callable[[], object]
    events: Events

    def wait(self) -> dict[int, float]:
        import torch

        torch.cuda.synchronize()
        return {draw: 1e3 * begin.elapsed_time(end) for draw, (begin, end) in self.events.items()}


Step = tuple[int, int]
"""The position of a call, and the number of a chunk of the draws."""


class _Walks:
    """Every call's walk over every chunk of the draws, captured when it is first due.

    Args:
        capture: makes the walk of a call, its position and a chunk.
        calls: what is timed.
        chunks: parts of the draws.
        before: see `Clock.paired_samples`.
    """

    def __init__(
        self,
        capture: Callable[[TimedCall, int, Sequence[int]], _Walk],
        calls: Sequence[TimedCall],
        chunks: Sequence[Sequence[int]],
        before: Before,
    ) -> None:
        self._capture, self._calls, self._chunks, self._before = capture, calls, chunks, before
        self._captured: dict[Step, _Walk] = {}

    def times_us(self, step: Step, following: Step) -> dict[int, float]:
        """The µs of each draw of `step`; while it runs, `following` is captured."""
        import torch

        if step not in self._captured:
            self._captured[step] = self._made(step)
        self._tell(step)
        self._captured[step].start()
        if following not in self._captured:
            try:
                self._captured[following] = self._made(following)
            except Exception:
                self._tell(step)
                torch.cuda.synchronize()  # raises if it is what runs that has failed
                self._tell(following)
                raise
            self._tell(step)
        return self._captured[step].wait()

    def _made(self, step: Step) -> _Walk:
        self._tell(step)  # it runs where it cannot be captured
        position, number = step
        return self._capture(self._calls[position], position, self._chunks[number])

    def _tell(self, step: Step) -> None:
        position, number = step
        self._before(position, len(self._chunks[number]))


def _chunks(draws: Sequence[int], call_us: float) -> list[tuple[int, ...]]:
    """`draws` in parts of as many calls as take `INTERLEAVE_US`, at least one."""
    size = max(1, int(INTERLEAVE_US / max(call_us, 1.0)))
    return [tuple(draws[at : at + size]) for at in range(0, len(draws), size)]


def _in_order(times: dict[int, list[float]], draws: Sequence[int]) -> list[float]:
    """Each draw's samples handed out in the order in which `draws` names it."""
    remaining = {draw: iter(samples) for draw, samples in times.items()}
    return [next(remaining[draw]) for draw in draws]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pauses the collector; no collection first, which takes 84 ms with torch and Triton loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
