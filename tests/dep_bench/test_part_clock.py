import itertools
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from moetune.dep_bench.device_clock import DeviceClock
from moetune.dep_bench.part_clock import HostClock
from moetune.dep_bench.process_group import Ranks
from moetune.errors import RankError


def test_each_part_has_its_time_and_marks_cost_nothing():
    ticks = itertools.count(0, 1000)  # each reading of the clock comes 1 µs after the one before
    before = []
    clock = HostClock(lambda: before.append("aligned"), lambda: next(ticks))

    def call(mark):
        mark("router")
        next(ticks)
        mark("experts")
        mark("experts")

    (take,) = clock.takes([call], static=True)
    take.start()
    assert take.read() == {"router": 1.0, "experts": 2.0 + 1.0}
    take.start()
    assert take.read() == {"router": 1.0, "experts": 3.0}
    assert before == ["aligned"] * 2
    assert clock.eager == ""


class PlantedGpu:
    """A GPU of one stream: what is enqueued runs at once, or when the graph that captured it is replayed."""

    def __init__(self):
        self.now_us, self.captured, self.replays = 0.0, None, 0

    def enqueue(self, work):
        (self.captured.append if self.captured is not None else lambda work: work())(work)

    def run(self, us):
        self.enqueue(lambda: setattr(self, "now_us", self.now_us + us))


@pytest.fixture
def gpu(monkeypatch):
    gpu = PlantedGpu()

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            gpu.captured = self.work = []

        def capture_end(self):
            gpu.captured = None

        def replay(self):
            gpu.replays += 1
            for work in self.work:
                work()

    class Event:
        def __init__(self, enable_timing, external):
            self.at_us = 0.0

        def record(self):
            gpu.enqueue(lambda: setattr(self, "at_us", gpu.now_us))

        def elapsed_time(self, end):
            return (end.at_us - self.at_us) / 1e3

    for name, value in (("CUDAGraph", Graph), ("Event", Event), ("synchronize", Mock()), ("stream", nullcontext)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    return gpu


def device_clock(gpu, ranks=None):
    clock = object.__new__(DeviceClock)
    clock.eager, clock._ranks, clock._before = "", ranks or Ranks(), lambda: gpu.run(5.0)
    clock._stream, clock._pool, clock._flush = Mock(), None, Mock()
    clock._flush.zero_.side_effect = lambda: gpu.run(1000.0)
    return clock


def parts_of(gpu, us):
    def call(mark):
        gpu.run(us)
        mark("dispatch")
        gpu.run(2 * us)
        mark("experts")
        gpu.run(us)
        mark("dispatch")

    return call


def test_a_graph_times_its_parts_without_the_flush_and_what_runs_before(gpu):
    clock = device_clock(gpu)
    takes = clock.takes([parts_of(gpu, us) for us in (10.0, 20.0)], static=True)
    assert gpu.now_us == 0.0  # captured only
    for take in takes:
        take.start()
    assert [take.read() for take in takes] == [
        {"dispatch": pytest.approx(20.0), "experts": pytest.approx(20.0)},
        {"dispatch": pytest.approx(40.0), "experts": pytest.approx(40.0)},
    ]
    takes[0].start()
    assert takes[0].read()["experts"] == pytest.approx(20.0)
    assert (gpu.replays, clock.eager) == (3, "")


def test_what_has_no_fixed_shapes_is_launched_each_time(gpu):
    clock = device_clock(gpu)
    (take,) = clock.takes([parts_of(gpu, 10.0)], static=False)
    take.start()
    assert take.read() == {"dispatch": pytest.approx(20.0), "experts": pytest.approx(20.0)}
    assert (gpu.replays, clock.eager) == (0, "its shapes depend on the routing")


def waiting(mark):
    """Waits for the device, which a graph cannot capture."""
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Other:
    """An exchange with a second rank, which cannot capture a call if `at` others were captured before."""

    def __init__(self, at, error=None):
        self.at, self.error, self.turns = at, error, 0

    def gather(self, value):
        if value is None:  # no error here
            return [None, self.error]
        self.turns += 1
        return [value, "planted failure of the second rank" if self.turns > self.at else ""]

    def name(self, rank):
        return f"Rank {rank} of 2"


@pytest.mark.parametrize("at", [0, 1])
def test_all_calls_are_timed_without_a_graph_if_one_rank_cannot_capture_one_of_them(gpu, at):
    plain = parts_of(gpu, 10.0)
    alone = [waiting, plain] if at == 0 else [plain, waiting]
    exchange = Other(at)
    for ranks, calls, reason in (
        (Ranks(), alone, "operation not permitted when stream is capturing"),
        (Ranks(0, 2, "cuda:0", exchange), [plain, plain], "planted failure of the second rank"),
    ):
        clock = device_clock(gpu, ranks)
        takes = clock.takes(calls, static=True)
        assert clock.eager == reason
        assert gpu.captured is None
        plains = [take for take, call in zip(takes, calls, strict=True) if call is plain]
        for take in plains:
            take.start()
        assert [take.read()["experts"] for take in plains] == pytest.approx([20.0] * len(plains))
        assert gpu.replays == 0
    assert exchange.turns == at + 1  # after the first failure no rank captures anything


def test_a_clock_without_graphs_tries_them_for_the_next_calls(gpu):
    clock = device_clock(gpu)
    clock.takes([waiting], static=True)
    (take,) = clock.takes([parts_of(gpu, 10.0)], static=True)
    take.start()
    assert (gpu.replays, clock.eager) == (1, "")


def test_no_memory_for_a_graph_is_an_error(gpu):
    def full(mark):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(RuntimeError, match="out of memory"):
        device_clock(gpu).takes([full], static=True)
    other = Ranks(0, 2, "cuda:0", Other(9, "CUDA out of memory"))
    with pytest.raises(RankError, match="Rank 1 of 2 failed: CUDA out of memory"):
        device_clock(gpu, other).takes([parts_of(gpu, 10.0)], static=True)
