"""Points from planted times: which rank is the slowest, what is compared with what, and what is timed once."""

from unittest.mock import Mock

import pytest

from moetune.dep_bench.arms import Arm
from moetune.dep_bench.measure import measure
from moetune.dep_bench.part_clock import HostClock
from moetune.dep_bench.process_group import Ranks
from moetune.errors import NoResultError
from moetune.spec.tactic import Tactic

US = {"slow": 400.0, "fast": 100.0}


class PlantedTime:
    def __init__(self):
        self.now = 0

    def spend(self, us):
        self.now += round(1000 * us)

    def __call__(self):
        return self.now


class PlantedCalls:
    """Two batches, the second one twice as long; the kernel takes 10 % less on sampled routings."""

    is_static = True

    def __init__(self, time, sampled=True):
        self.rows, self.received_bytes = [8, 16], [100, 300]
        self.time, self.sampled, self.started = time, sampled, []

    def warm(self, tactic_of):
        return tactic_of(8)

    def check(self, out):
        if out["algorithm"] == "wrong":
            raise NoResultError("planted")
        return 0.001

    def call(self, tactic_of, batch):
        def call(mark):
            self.started.append(str(tactic_of(self.rows[batch])["algorithm"]))
            self.time.spend(50.0)
            mark("dispatch")
            self.time.spend(US[self.started[-1]] * (1 + batch))
            mark("experts")

        return call

    def dummy(self, tactic_of, batch):
        if not self.sampled:
            return None

        def call(mark):
            self.time.spend(0.9 * US[str(tactic_of(8)["algorithm"])] * (1 + batch))
            mark("experts")

        return call


class SecondRank(Ranks):
    """The first of two ranks. The other one needs 1.5 times as long for the experts, and half as long otherwise."""

    def gather(self, value):
        return [value, slower(value)]


def slower(value):
    if isinstance(value, dict):
        return {part: us * (1.5 if part == "experts" else 0.5) for part, us in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        return [slower(one) for one in value]
    return value


def arm(name, algorithm):
    return Arm(name, "planted", lambda rows: Tactic(algorithm=algorithm))


def point(arms, ranks=None, **changed):
    time = PlantedTime()
    calls = PlantedCalls(time, **changed)
    clock = HostClock(lambda: None, time)
    shared = {"tokens": 30, "routing": "random", "plan_bytes": 7, "batches": 2, "rounds": 3}
    return measure(calls, arms, clock, ranks or Ranks(), **shared), calls


def test_arms_are_compared_with_the_last_one():
    found, _ = point([arm("default", "slow"), arm("dispatcher", "fast")])
    default, dispatcher = found.arms
    assert (default.time_us, dispatcher.time_us) == (650.0, 200.0)
    assert dispatcher.tokens_per_s == pytest.approx(30 / 200e-6)
    assert default.gain == pytest.approx(3.25)
    assert default.gain_low <= 3.25 <= default.gain_high
    assert (dispatcher.gain, dispatcher.gain_low, dispatcher.gain_high) == (1.0, 1.0, 1.0)
    assert (found.noise, found.rows_low, found.rows_high, found.received_bytes) == (0.0, 8, 16, 200)
    assert default.tactics == (Tactic(algorithm="slow"),)


def test_the_slowest_rank_counts():
    found, _ = point([arm("default", "slow"), arm("dispatcher", "fast")], SecondRank(0, 2))
    assert [each.time_us for each in found.arms] == [25 + 900, 25 + 225]
    assert [(part.part, part.fastest_us, part.slowest_us) for part in found.parts] == [
        ("dispatch", 25.0, 50.0),
        ("experts", 150.0, 225.0),
    ]


def test_the_kernel_is_compared_with_its_time_on_sampled_routings():
    found, _ = point([arm("default", "slow"), arm("dispatcher", "fast")], SecondRank(0, 2))
    assert found.fidelity == pytest.approx(1 / 0.9)
    assert found.fidelity_by_rank == pytest.approx([1 / 0.9] * 2)
    assert found.arms[1].dummy_us == pytest.approx(135.0 * 1.25)
    assert found.dummy_agrees
    without, _ = point([arm("default", "slow"), arm("dispatcher", "fast")], sampled=False)
    assert (without.fidelity, without.fidelity_by_rank, without.dummy_agrees) == (None, (), None)


def test_arms_with_the_same_tactics_are_timed_once():
    same = [arm("default", "slow"), arm("engine", "fast"), arm("pure_ep", "slow"), arm("dispatcher", "fast")]
    found, calls = point(same)
    assert sorted(calls.started) == sorted(["slow", "fast", "fast"] * 2 * (1 + 3))  # the last arm twice, for the noise
    assert [each.gain for each in found.arms] == [3.25, 1.0, 3.25, 1.0]
    assert found.arms[0].time_us == found.arms[2].time_us


def test_arms_that_differ_on_another_rank_are_timed_apart():
    class Differing(Ranks):
        def gather(self, value):
            tactics = isinstance(value, list) and value and isinstance(value[0], tuple)
            return [value, [(number,) for number, _ in enumerate(value)] if tactics else value]

    _, calls = point([arm("default", "fast"), arm("dispatcher", "fast")], Differing(0, 2))
    assert len(calls.started) == 3 * 2 * (1 + 3)


def test_the_arms_take_turns():
    _, calls = point([arm("default", "slow"), arm("dispatcher", "fast")], sampled=False)
    by_turn = [tuple(calls.started[at : at + 3]) for at in range(0, len(calls.started), 3)]
    assert len(by_turn) == 2 * (1 + 3)
    assert all(sorted(turn) == ["fast", "fast", "slow"] for turn in by_turn)
    assert len(set(by_turn)) == 3  # the slow arm comes first, in the middle and last


def test_a_wrong_arm_ends_the_point_before_anything_is_timed():
    time = PlantedTime()
    calls = PlantedCalls(time)
    shared = {"tokens": 30, "routing": "random", "plan_bytes": 7, "batches": 2, "rounds": 3}
    with pytest.raises(NoResultError, match="planted"):
        measure(calls, [arm("default", "wrong"), arm("dispatcher", "fast")], HostClock(Mock(), time), Ranks(), **shared)
    assert calls.started == []
