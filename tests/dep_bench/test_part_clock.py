import itertools

from moetune.dep_bench.part_clock import HostClock


def test_each_part_has_its_time_and_marks_cost_nothing():
    ticks = itertools.count(0, 1000)  # each reading of the clock comes 1 µs after the one before
    before = []
    clock = HostClock(lambda: before.append("aligned"), lambda: next(ticks))

    def call(mark):
        mark("router")
        next(ticks)
        mark("experts")
        mark("experts")

    take = clock.take(call, static=True)
    take.start()
    assert take.read() == {"router": 1.0, "experts": 2.0 + 1.0}
    take.start()
    assert take.read() == {"router": 1.0, "experts": 3.0}
    assert before == ["aligned"] * 2
    assert clock.eager == ""
