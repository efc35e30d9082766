"""The clocks pair, order and measure."""

import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moetune.measure.clock import INTERLEAVE_US, SETTLE_US, CpuClock, CudaClock, _chunks, clock_for, order

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


def recorder(name: str, log: list[tuple[str, int]]) -> Callable[[int], None]:
    return lambda draw: log.append((name, draw))


@given(count=st.integers(1, 9))
def test_every_call_stands_at_each_place_and_follows_each_other_equally_often(count: int) -> None:
    turns = [order(count, turn) for turn in range(2 * count)]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    places = Counter((place, position) for turn in turns for place, position in enumerate(turn))
    assert places == dict.fromkeys(itertools.product(range(count), repeat=2), 2)
    pairs = Counter(pair for turn in turns for pair in itertools.pairwise(turn))
    assert pairs == dict.fromkeys(itertools.permutations(range(count), 2), 2)


def test_each_sample_times_every_call_once_on_its_draw() -> None:
    log: list[tuple[str, int]] = []
    draws = [4, 0, 4, 2]
    samples = CpuClock().paired_samples([recorder(name, log) for name in "abc"], draws)
    assert [len(of_call) for of_call in samples] == [4, 4, 4]
    rounds = [log[3 * turn : 3 * turn + 3] for turn in range(4)]
    for draw, one_round in zip(draws, rounds, strict=True):
        assert sorted(one_round) == [("a", draw), ("b", draw), ("c", draw)]
    assert [one_round[0][0] for one_round in rounds[:3]] == ["a", "b", "c"]


def test_before_is_called_with_the_next_call_before_it_runs() -> None:
    log: list[tuple[str, int]] = []
    calls = [recorder(name, log) for name in "ab"]
    CpuClock().paired_samples(calls, [5, 6], lambda position, runs: log.append((f"before {'ab'[position]}", runs)))
    names = [name for name, _ in log]
    assert names == ["before a", "a", "before b", "b", "before b", "b", "before a", "a"]
    assert {runs for name, runs in log if name.startswith("before")} == {1}


def test_times_are_microseconds_of_the_right_call_and_sample() -> None:
    elapsed_ns = [0]

    def take(us: float) -> None:
        elapsed_ns[0] += int(1000 * us)

    calls = [lambda draw: take((2000, 8000)[draw]), lambda draw: take(0.5)]
    slow, quick = CpuClock(lambda: elapsed_ns[0]).paired_samples(calls, [0, 1, 0])
    assert slow == [2000, 8000, 2000]
    assert quick == [0.5] * 3


def test_a_cpu_clock_reads_real_time_by_default() -> None:
    begin = time.perf_counter_ns()
    ((sample_us,),) = CpuClock().paired_samples([lambda draw: sum(range(10_000))], [0])
    assert 0 < 1e3 * sample_us <= time.perf_counter_ns() - begin


def test_warm_up_runs_the_call_once_and_lets_its_error_through() -> None:
    log: list[tuple[str, int]] = []
    CpuClock().warm_up(recorder("a", log), 3)
    assert log == [("a", 3)]
    with pytest.raises(ZeroDivisionError):
        CpuClock().warm_up(lambda draw: 1 / 0, 0)


def test_garbage_collection_rests_while_time_is_taken_and_comes_back_after_an_error() -> None:
    states: list[bool] = []
    CpuClock().paired_samples([lambda draw: states.append(gc.isenabled())], [0])
    assert states == [False]
    with pytest.raises(ZeroDivisionError):
        CpuClock().paired_samples([lambda draw: 1 / 0], [0])
    assert gc.isenabled()


def test_taking_time_collects_no_garbage() -> None:
    collections: list[str] = []

    def count(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    clock = CpuClock()
    gc.disable()
    gc.callbacks.append(count)
    try:
        clock.paired_samples([lambda draw: [[] for _ in range(10_000)]], range(3))
    finally:
        gc.callbacks.remove(count)
        gc.enable()
    assert collections == []


@pytest.mark.parametrize(("call_us", "sizes"), [(1.0, [16]), (125.0, [16]), (1000.0, [2] * 8), (9000.0, [1] * 16)])
def test_calls_alternate_the_more_often_the_longer_they_take(call_us: float, sizes: list[int]) -> None:
    chunks = _chunks(range(16), call_us)
    assert [len(chunk) for chunk in chunks] == sizes
    assert [draw for chunk in chunks for draw in chunk] == list(range(16))


def test_nothing_to_time_is_no_error() -> None:
    assert CpuClock().paired_samples([], [0, 1]) == []
    assert CpuClock().paired_samples([lambda draw: None], []) == [[]]


def test_the_device_chooses_the_clock() -> None:
    assert isinstance(clock_for("cpu"), CpuClock)


class _FailingGraph:
    """Capturing into it fails, and then ending the capture does too."""

    def capture_begin(self, pool: object, capture_error_mode: str) -> None: ...

    def capture_end(self) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class _Device:
    """A GPU of one stream: what is enqueued runs at once, or when the graph that captured it is replayed."""

    def __init__(self) -> None:
        self.now_us, self.captured = 0.0, None

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def run(self, us: float) -> None:
        def work() -> None:
            self.now_us += us

        self.enqueue(work)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> _Device:
    gpu = _Device()

    class Graph:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            gpu.captured = self.work = []

        def capture_end(self) -> None:
            gpu.captured = None

        def replay(self) -> None:
            for work in self.work:
                work()

    class Event:
        at_us = 0.0

        def record(self) -> None:
            gpu.enqueue(lambda: setattr(self, "at_us", gpu.now_us))

        def elapsed_time(self, end: "Event") -> float:
            return (end.at_us - self.at_us) / 1e3

    def synchronize() -> None:
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(CudaClock, "_event", lambda self, external=False: Event())
    return gpu


def cuda_clock(gpu: _Device) -> CudaClock:
    clock = object.__new__(CudaClock)
    clock._device, clock._side_stream, clock._flush, clock.eager = None, Mock(), Mock(), {}
    clock._flush.zero_.side_effect = lambda: gpu.run(1e6)
    return clock


@given(
    draws=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    us=st.lists(st.sampled_from([3.0, 700.0, 9000.0]), min_size=1, max_size=4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_the_cuda_clock_pairs_by_draw_and_times_the_call_alone(gpu: _Device, draws: list[int], us: list[float]) -> None:
    calls = [lambda draw, us=us: gpu.run(us + draw) for us in us]
    samples = cuda_clock(gpu).paired_samples(calls, draws)
    assert samples == [[pytest.approx(us + draw) for draw in draws] for us in us]


def test_calls_of_the_cuda_clock_alternate_every_few_milliseconds(gpu: _Device) -> None:
    announced: list[tuple[int, int]] = []
    ran_as: list[tuple[int, int]] = []
    ran: list[int] = []

    def call(position: int, draw: int) -> None:
        gpu.run(1000.0)
        gpu.enqueue(lambda: ran.append(position))
        gpu.enqueue(lambda: ran_as.append(announced[-1]))

    calls = [partial(call, position) for position in range(2)]
    cuda_clock(gpu).paired_samples(calls, range(8), lambda position, runs: announced.append((position, runs)))
    assert ran == [0] + [position for position in [0, 1, 1, 0, 1, 0, 0, 1] for _ in range(2)]  # once to see how long
    assert ran_as == [(0, 1)] + [(position, 2) for position in ran[1:]]


def test_a_call_is_captured_while_the_one_before_runs(gpu: _Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last announced position is that of the call that runs or is captured."""
    log: list[str] = []

    class Graph(torch.cuda.CUDAGraph):  # type: ignore[misc]
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            log.append("capture")
            super().capture_begin(pool, capture_error_mode)

        def replay(self) -> None:
            log.append("start")
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    calls = [lambda draw: gpu.run(20.0)] * 3
    cuda_clock(gpu).paired_samples(calls, [0, 1, 0, 1], lambda position, runs: log.append(f"{position}"))
    assert log[:2] == ["0", "wait"]
    first = "0 capture 0 start 1 capture 0 wait 1 start 2 capture 1 wait 2 start wait"
    assert " ".join(log[2:]) == f"{first} 1 start wait 2 start wait 0 start wait"


@pytest.mark.parametrize("guilty", [0, 1])
def test_what_fails_on_the_device_while_another_is_captured_is_announced_last(
    gpu: _Device, monkeypatch: pytest.MonkeyPatch, guilty: int
) -> None:
    """Its error is raised by whatever uses the device next, here the capture of the next call."""
    announced: list[int] = []
    broken: list[int] = []

    def synchronize() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def call(position: int, draw: int) -> None:
        synchronize()
        gpu.run(20.0)
        if position == guilty and draw == 1:
            gpu.enqueue(lambda: broken.append(position))

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    calls = [partial(call, position) for position in range(4)]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cuda_clock(gpu).paired_samples(calls, [0, 1], lambda position, runs: announced.append(position))
    assert announced[-1] == guilty


def test_what_cannot_be_captured_at_all_is_announced_last(gpu: _Device) -> None:
    announced: list[int] = []
    calls: list[Callable[[int], object]] = [lambda draw: gpu.run(20.0), lambda draw: gpu.run(20.0), lambda draw: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        cuda_clock(gpu).paired_samples(calls, [0, 1], lambda position, runs: announced.append(position))
    assert announced[-1] == 2


@given(
    us=st.sampled_from([20.0, 700.0, 3000.0, 9000.0]),
    count=st.integers(1, 6),
    draws=st.integers(1, 8),
    rounds=st.integers(1, 3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_what_takes_long_is_run_untimed_until_the_device_has_settled(
    gpu: _Device, us: float, count: int, draws: int, rounds: int
) -> None:
    """And is timed as often as ever."""
    ran: list[float] = []

    def call(draw: int) -> None:
        gpu.run(us)
        gpu.enqueue(lambda: ran.append(us))

    samples = cuda_clock(gpu).paired_samples([call] * count, list(range(draws)) * rounds)
    assert samples == [[pytest.approx(us)] * (draws * rounds)] * count
    timed_us = us * count * draws * rounds
    untimed_us = sum(ran[1:]) - timed_us
    if timed_us <= SETTLE_US:
        assert untimed_us == 0
    else:
        longest_us = max(us, INTERLEAVE_US)
        assert min(SETTLE_US, timed_us - longest_us) <= untimed_us < SETTLE_US + longest_us


def test_what_waits_for_the_device_is_timed_without_a_graph_and_listed_until_the_next_time(gpu: _Device) -> None:
    def waits(draw: int) -> None:
        gpu.run(50.0)
        torch.cuda.synchronize()

    clock = cuda_clock(gpu)
    assert clock.paired_samples([lambda draw: gpu.run(20.0), waits], [0, 1]) == [[20.0] * 2, [50.0] * 2]
    assert clock.eager == {1: "operation not permitted when stream is capturing"}
    clock.paired_samples([], [0])
    assert clock.eager == {}


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2.00 GiB", "operation not permitted"])
def test_what_finds_no_memory_for_its_graph_is_not_timed_without_one(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _FailingGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(CudaClock, "_event", lambda self, external=False: Mock())
    clock = object.__new__(CudaClock)
    clock._side_stream, clock._flush, clock.eager = Mock(), Mock(), {}

    def call(draw: int) -> None:
        raise RuntimeError(said)

    if "memory" in said:
        with pytest.raises(RuntimeError, match="out of memory"):
            clock._walk(call, 5, [0])
        assert clock.eager == {}
    else:
        clock._walk(call, 5, [0])
        assert clock.eager == {5: said}


@pytest.mark.gpu
@needs_cuda
def test_cuda_clock_times_work_and_pairs_by_draw() -> None:
    sizes = {0: 1 << 20, 1: 1 << 28}  # the larger far beyond what launches and waits take
    source = torch.randn(1 << 28, device="cuda")
    clock = clock_for("cuda")
    assert isinstance(clock, CudaClock)

    def double(draw: int) -> torch.Tensor:
        return source[: sizes[draw]] * 2

    def double_and_wait(draw: int) -> torch.Tensor:
        result = double(draw)
        result[0].item()  # cannot be captured
        return result

    for call in (double, double_and_wait):
        clock.warm_up(call, 0)
        clock.warm_up(call, 1)
    calls, draws = [double, double_and_wait, lambda draw: None], [0, 1, 1, 0] * 5
    captured, uncaptured, nothing = clock.paired_samples(calls, draws)
    assert [len(times) for times in (captured, uncaptured, nothing)] == [len(draws)] * 3
    small, large = (
        [
            median([time for time, drawn in zip(times, draws, strict=True) if drawn == draw])
            for times in (captured, uncaptured)
        ]
        for draw in (0, 1)
    )
    assert large[0] > 2 * small[0]
    assert large[1] > 2 * small[1]
    assert large[0] == pytest.approx(large[1], rel=0.5)
    assert max(nothing) < min(captured)


@pytest.mark.gpu
@needs_cuda
def test_cuda_clock_captures_call_after_call() -> None:
    source = torch.randn(1 << 20, device="cuda")
    clock = CudaClock("cuda")
    for _ in range(3):
        clock.paired_samples([lambda draw: source * 2, lambda draw: source + draw], [0, 1, 0])
    assert clock.eager == {}
    clock.paired_samples([lambda draw: source, lambda draw: source.sum().item()], [0])
    assert clock.eager.keys() == {1}


@pytest.mark.gpu
@needs_cuda
def test_cuda_clock_times_with_a_cold_l2() -> None:
    quarter = torch.cuda.get_device_properties(0).L2_cache_size // 4
    source = torch.ones(quarter, dtype=torch.int8, device="cuda")
    cold = min(CudaClock("cuda").paired_samples([lambda draw: source.sum()], [0] * 9)[0])
    graph = torch.cuda.CUDAGraph()
    source.sum()
    with torch.cuda.graph(graph):
        for _ in range(50):
            source.sum()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    assert cold > 1e3 * begin.elapsed_time(end) / 50
