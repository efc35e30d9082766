"""Clocks time calls in interleaved, paired rounds, with caches as cold as they are in an engine."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from moetune.measure.capture import captured_in
from moetune.measure.reasons import is_out_of_memory

if TYPE_CHECKING:
    import torch

    Events = dict[int, tuple[torch.cuda.Event, torch.cuda.Event]]

TimedCall = Callable[[int], object]
"""Runs one tactic on the draw of the given number. It may return before the device has finished."""

Before = Callable[[int, int], None]
"""Is called before a call runs, with the call's position and the number of its runs before the next notification."""


class Clock(Protocol):
    """Times several calls in the same rounds, so that a drift of the device affects all of them alike.

    Attributes:
        eager: the calls of the last `paired_samples` that were timed without a CUDA graph: position → reason.
    """

    eager: dict[int, str]

    def warm_up(self, call: TimedCall, draw: int) -> None:
        """Runs `call` once, untimed, and waits for it. This compiles kernels and fills caches.

        Raises:
            Exception: whatever the call raises.
        """
        ...

    def paired_samples(
        self, calls: Sequence[TimedCall], draws: Sequence[int], before: Before = lambda position, runs: None
    ) -> list[list[float]]:
        """Times every call once for each entry of `draws`. The order of the calls changes from round to round.

        Args:
            calls: what to time.
            draws: the number of a draw for each round.
            before: is called before each run.

        Returns:
            [call][sample] in µs; sample i of every call was taken in one round, on `draws[i]`.

        Raises:
            Exception: whatever a call raises. The last position that `before` received is that call's.
        """
        ...


INTERLEAVE_US = 2000.0
"""About how long one call is timed before the next call's turn. A turn has at least one execution.

Measured on an H200 at its power limit (0.7 ms a call, 8 calls, 32 samples): the spread of a ratio over repetitions is
0.09 %. With 4 ms it is 0.2 %. With 1 ms the spread is the same and the measurement takes a third longer.
"""

SETTLE_US = 50_000.0
"""If all timings together take longer than this, the clock first runs calls untimed for this long.

After a pause of some milliseconds an H200 runs above its power limit for 40 to 70 ms. It is then 5 to 10 % faster than
later, and a different tactic may be the fastest. Measured with 24 tactics timed once each (4.3 ms a call): times are
off by 3.5 % (1 σ) after a pause, and by 1.4 % with the GPU at its limit.
"""


def clock_for(device: str) -> Clock:
    """Returns a clock for a torch device: a `CudaClock` for a GPU, otherwise a `CpuClock`."""
    return CudaClock(device) if device.startswith("cuda") else CpuClock()


def order(count: int, turn: int) -> list[int]:
    """Returns the positions 0 … count − 1 in the order of one turn of a Williams design (E. J. Williams, 1949).

    Over 2 · count turns every position occurs twice at each place and follows each other position twice. So the
    after-effects of a call, such as a cooler GPU or a fuller cache, affect all other calls alike.
    """
    cycle, start = divmod(turn, count) if count else (0, 0)
    ends_inwards = (step // 2 + 1 if step % 2 else -(step // 2) for step in range(count))
    line = [(start + position) % count for position in ends_inwards]
    return line[::-1] if cycle % 2 else line


class CpuClock:
    """Reads the time before and after each call, with the garbage collector paused.

    Args:
        now_ns: returns the current time in ns.
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
        with no_garbage_collection():
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
    """Times calls by CUDA events inside a CUDA graph. The L2 cache is overwritten before each call.

    Each call is captured in graphs that run it on one draw after the other. So weights and activations are as cold as
    between two layers of a model, and no launch overhead is timed. A call that cannot be captured, because it waits for
    the device, is timed by events without a graph; its times include launch overhead, as they would in an engine.

    Args:
        device: the torch device.

    Attributes:
        eager: the calls of the last `paired_samples` that could not be captured: position → reason.
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
        """See `Clock`. A draw that is listed n times is sampled in n rounds.

        The calls alternate after as many draws as take `INTERLEAVE_US`, because a GPU at its power limit changes its
        clock rate within milliseconds and all calls must be timed at the same rate. The GPU must not pause either, so
        the next call is captured while the current one runs.
        """
        import torch

        self.eager = {}
        if not draws or not calls:
            return [[] for _ in calls]
        rounds = max(Counter(draws).values())
        distinct = tuple(dict.fromkeys(draws))
        times: list[dict[int, list[float]]] = [{draw: [] for draw in distinct} for _ in calls]
        with torch.cuda.device(self._device), no_garbage_collection():
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
        """Returns about how long a call takes in µs, launch overhead included."""
        import torch

        begin, end = self._event(), self._event()
        begin.record()
        call(draw)
        end.record()
        torch.cuda.synchronize()
        return 1e3 * float(begin.elapsed_time(end))

    def _walk(self, call: TimedCall, position: int, draws: Sequence[int]) -> _Walk:
        """Returns the walk of `call` over the draws, as a graph if it can be captured."""
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            events = self._events(draws, external=True)
            with captured_in(graph, self._side_stream):
                self._enqueue(call, events)
        except RuntimeError as error:  # the call synchronizes, which is not allowed in a capture
            if is_out_of_memory(error):  # a time without a graph could not be compared with the others
                raise
            self.eager[position] = str(error).splitlines()[0]
            torch.cuda.synchronize()
            eager_events = self._events(draws, external=False)
            return _Walk(partial(self._enqueue, call, eager_events), eager_events)
        return _Walk(graph.replay, events)

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
    """One call on several draws. `start` launches them, and `wait` returns the time of each in µs."""

    start: Callable[[], object]
    events: Events

    def wait(self) -> dict[int, float]:
        import torch

        torch.cuda.synchronize()
        return {draw: 1e3 * begin.elapsed_time(end) for draw, (begin, end) in self.events.items()}


Step = tuple[int, int]
"""The position of a call, and the number of a chunk of the draws."""


class _Walks:
    """The walks of all calls over all chunks of the draws. Each is captured when it is first needed.

    Args:
        capture: makes a walk from a call, its position and a chunk.
        calls: what to time.
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
        """Runs `step` and returns the time of each draw in µs. While it runs, `following` is captured."""
        import torch

        if step not in self._captured:
            self._captured[step] = self._made(step)
        self._announce(step)
        self._captured[step].start()
        if following not in self._captured:
            try:
                self._captured[following] = self._made(following)
            except Exception:
                self._announce(step)
                torch.cuda.synchronize()  # raises if it was `step` that failed
                self._announce(following)
                raise
            self._announce(step)
        return self._captured[step].wait()

    def _made(self, step: Step) -> _Walk:
        self._announce(step)  # because a call that cannot be captured runs here
        position, number = step
        return self._capture(self._calls[position], position, self._chunks[number])

    def _announce(self, step: Step) -> None:
        position, number = step
        self._before(position, len(self._chunks[number]))


def _chunks(draws: Sequence[int], call_us: float) -> list[tuple[int, ...]]:
    """Splits `draws` into chunks. A chunk has as many draws as take `INTERLEAVE_US`, at least one."""
    size = max(1, int(INTERLEAVE_US / max(call_us, 1.0)))
    return [tuple(draws[at : at + size]) for at in range(0, len(draws), size)]


def _in_order(times: dict[int, list[float]], draws: Sequence[int]) -> list[float]:
    """Returns the samples in the order of `draws`. `times` has the samples of each draw in the order of its rounds."""
    remaining = {draw: iter(samples) for draw, samples in times.items()}
    return [next(remaining[draw]) for draw in draws]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pauses the garbage collector. It does not collect first: that takes 84 ms with torch and Triton loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
