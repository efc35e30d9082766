"""A time that passes only as planted kernels run: what CPU timings read in tests, so that no test has to sleep."""

from moetune.measure import bench
from moetune.measure.clock import CpuClock

_now_ns, _runs = 0, 0


def now_ns() -> int:
    """Returns the planted time."""
    return _now_ns


def spend(milliseconds: float) -> None:
    """Lets time pass, each time by one nanosecond more, so that no two timings of 1000 are equal."""
    global _now_ns, _runs
    _runs += 1
    _now_ns += int(1e6 * milliseconds) + _runs % 1000  # else thousands of runs in other tests would add up


def install() -> None:
    """Has the benches of this process, test or worker, read the planted time; `conftest` undoes it after a test."""
    bench.clock_for = lambda device: CpuClock(now_ns)
