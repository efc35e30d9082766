"""A tactic that fails costs that tactic only, whenever it fails; the observer is notified before each activity."""

import pytest
from planted_failures import FailingBackend, problem, tactic

from moetune.errors import DeviceLostError
from moetune.measure import bench as bench_module
from moetune.measure.bench import Activity, Bench
from moetune.measure.clock import CpuClock

GOOD, OTHER = tactic("default"), tactic("other")


class Recorder:
    def __init__(self):
        self.started, self.failed_tactics = [], []

    def starts(self, activity, tactic=None, runs=1):
        self.started.append((activity, tactic, runs))

    def failed(self, tactic, reason):
        self.failed_tactics.append((tactic, reason))


def test_a_tactic_that_fails_only_while_it_is_timed_costs_the_round_and_not_the_others():
    late = tactic("raises", from_run=3)
    bench = Bench(FailingBackend(), problem())
    first, failed, other, again = bench.samples([GOOD, late, OTHER, GOOD], [0, 1, 2])
    assert failed is None
    assert [len(series) for series in (first, other, again)] == [3, 3, 3]
    assert bench.failures == {late: "RuntimeError: planted failure"}


def test_where_all_fail_nothing_is_timed():
    late = tactic("raises", from_run=2)
    assert Bench(FailingBackend(), problem()).samples([late, tactic("raises"), late], [0]) == [None] * 3


class Cramped(CpuClock):
    """Has memory for one call at a time, and none to time `hungry`, which its first run did not show."""

    def paired_samples(self, calls, draws, before=lambda position, runs: None):
        before(0, 1)
        if len(calls) > 1 or calls[0].args[0] == tactic("hungry"):
            raise MemoryError("no room")
        return super().paired_samples(calls, draws, before)


def test_tactics_that_do_not_fit_into_memory_together_are_timed_alone():
    bench = Bench(FailingBackend(), problem(), Cramped())
    series = bench.samples([GOOD, tactic("hungry"), OTHER, GOOD], [0, 1])
    assert [samples and len(samples) for samples in series] == [2, None, 2, 2]
    assert bench.failures == {tactic("hungry"): "out of memory: MemoryError: no room"}


def test_a_lost_device_ends_the_bench_and_names_the_tactic(monkeypatch):
    monkeypatch.setattr(bench_module, "is_lost", lambda device: True)
    recorder = Recorder()
    bench = Bench(FailingBackend(), problem(), observer=recorder)
    with pytest.raises(DeviceLostError, match="raises"):
        bench.samples([GOOD, tactic("raises"), OTHER], [0])
    assert recorder.failed_tactics == [(tactic("raises"), "RuntimeError: planted failure")]


def test_the_observer_is_notified_before_every_activity():
    recorder = Recorder()
    bench = Bench(FailingBackend(), problem(), observer=recorder)
    bench.samples([GOOD, OTHER], [0, 1])
    bench.check(GOOD, 0)
    bench.check(GOOD, 0)
    first_runs = [(Activity.FIRST_RUN, GOOD, 1), (Activity.FIRST_RUN, OTHER, 1)]
    timing = [(Activity.TIMING, each, 1) for each in (GOOD, OTHER, OTHER, GOOD)]
    assert recorder.started == [*first_runs, *timing, (Activity.REFERENCE, None, 1), (Activity.CHECK, GOOD, 1)]


def test_a_cpu_cannot_be_lost():
    assert not bench_module.is_lost("cpu")


class Launching(CpuClock):
    """Captures no second call."""

    def paired_samples(self, calls, draws, before=lambda position, runs: None):
        series = super().paired_samples(calls, draws, before)
        self.eager = {1: "it synchronizes"} if len(calls) > 1 else {}
        return series


def test_what_was_timed_without_a_graph_is_known_by_its_name():
    bench = Bench(FailingBackend(), problem(), Launching())
    good, other = tactic("default"), tactic("fast")
    bench.samples([tactic("raises"), good, other], [0])
    assert bench.eager == {other: "it synchronizes"}
    bench.samples([good], [0])
    assert bench.eager == {other: "it synchronizes"}


class FirstRuns(CpuClock):
    """First runs take what `seconds` says, on a clock of their own."""

    def __init__(self, monkeypatch, **seconds):
        super().__init__()
        self._now_s, self._seconds = 0.0, {tactic(name): list(taken) for name, taken in seconds.items()}
        monkeypatch.setattr(bench_module, "perf_counter", lambda: self._now_s)

    def warm_up(self, call, draw):
        super().warm_up(call, draw)
        left = self._seconds.get(call.args[0], [])
        self._now_s += left.pop(0) if left else 0.001


def test_a_tactic_whose_second_run_too_is_far_slower_than_the_best_is_not_timed(monkeypatch):
    clock = FirstRuns(monkeypatch, other=[3.0, 0.09], slow=[3.0, 0.4])
    recorder = Recorder()
    bench = Bench(FailingBackend(), problem(), clock, recorder)
    good, compiled, slow = bench.samples([GOOD, OTHER, tactic("slow")], [0, 1], limit_us=1e5)
    assert (len(good), len(compiled), slow) == (2, 2, None), "a first run may compile"
    assert bench.failures == {tactic("slow"): "stopped: one run takes 400 ms, the limit is 100 ms"}
    assert recorder.failed_tactics == list(bench.failures.items())
    assert (Activity.TIMING, tactic("slow"), 1) in recorder.started


def test_without_a_limit_no_tactic_is_too_slow(monkeypatch):
    bench = Bench(FailingBackend(), problem(), FirstRuns(monkeypatch, slow=[3.0, 3.0]))
    assert None not in bench.samples([GOOD, tactic("slow")], [0])
