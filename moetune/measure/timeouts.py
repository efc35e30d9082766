"""How long a worker's activities may take, and from how long on a tactic is stopped because it cannot win."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moetune.measure.bench import Activity

SLOW: Final = 20
"""A tactic is stopped if one run of it takes more than this many times the best time so far."""
STOPPED_FROM_US: Final = 100_000.0
"""A run that takes less is never stopped: it costs little, and a busy CPU can delay a run that long."""


def slow_limit_us(times_us: Iterable[float]) -> float:
    """Returns how long one run of a tactic may take in µs, given the times of others; infinite if there are none."""
    return max(SLOW * min(times_us, default=math.inf), STOPPED_FROM_US)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The seconds that each activity may take. After that, the process counts as hung and is killed.

    A first run may compile, so nothing about it can be learned from other tactics' runs. All later runs of a tactic are
    bounded by the limit that the best tactic so far sets, as soon as there is one.

    Attributes:
        prepare_s: the start of a process, the preparation of a problem, or a reference computation.
        first_run_s: the first run of a tactic, compilation included.
        timing_s: a batch of runs of one tactic, or a check, apart from `run_s` for each run.
        run_s: each run in a batch or a check.
        learned_s: a batch of runs, apart from the limit for each run, once that is known. It is for the capture of a
            graph, and for a machine that is busy.
    """

    prepare_s: float = 600.0
    first_run_s: float = 60.0
    timing_s: float = 30.0
    run_s: float = 1.0
    learned_s: float = 10.0

    def limit_s(self, activity: Activity, runs: int = 1, limit_us: float = math.inf) -> float:
        """Returns how long an activity of `runs` runs may take, if one run may take `limit_us`."""
        match activity:
            case Activity.FIRST_RUN:
                return self.first_run_s
            case Activity.TIMING:
                return min(self.timing_s + runs * self.run_s, self.learned_s + runs * limit_us / 1e6)
            case Activity.CHECK:
                return self.timing_s + runs * self.run_s
            case _:
                return self.prepare_s


def how_it_hung(runs: int, limit_s: float, learned: bool) -> str:
    """Returns why a process counts as hung.

    Args:
        runs: how often the tactic was to run.
        limit_s: how long that was allowed to take.
        learned: whether the best tactic so far has set the limit.
    """
    if not learned:
        return f"hung: not finished within {limit_s:g} s"
    run = "one run" if runs == 1 else f"each of {runs} runs"
    return f"stopped: not finished within {limit_s:.3g} s, which allows {run} {SLOW} times the best so far"
