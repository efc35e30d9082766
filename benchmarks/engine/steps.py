"""Step times out of the outputs of vLLM's engine core."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

TRIM = 4
"""The steps at each end of a steady series that are left out: graphs settle there, and other ranks start and end."""


class Step(NamedTuple):
    """One message of the engine core.

    Attributes:
        at_s: when the engine core made it, on the host's monotonic clock.
        outputs: the number of sequences that got a token.
    """

    at_s: float
    outputs: int


class Recorder:
    """Keeps the steps that pass through a `get_output` of vLLM's engine-core client.

    The timestamp is the engine core's own, so the time is not that of the process that reads the outputs.
    """

    def __init__(self, get_output: Callable[[], Any]) -> None:
        self._get_output = get_output
        self.steps: list[Step] = []

    def __call__(self) -> Any:
        outputs = self._get_output()
        if outputs.outputs:
            self.steps.append(Step(outputs.timestamp, len(outputs.outputs)))
        return outputs

    def take(self) -> list[Step]:
        """Returns the steps since the last call."""
        taken, self.steps = self.steps, []
        return taken


def steady_ms(steps: Sequence[Step], outputs: int, trim: int = TRIM) -> list[float]:
    """Returns the times in ms of the steps of the longest series in which each step gave `outputs` sequences a token.

    A step's time is from the message before it to its own. So the first of a series has none.

    Args:
        steps: the steps in order.
        outputs: the number of sequences.
        trim: how many times are left out at each end.
    """
    longest: list[Step] = []
    series: list[Step] = []
    for step in steps:
        series = [*series, step] if step.outputs == outputs else []
        longest = max(longest, series, key=len)
    times = [(after.at_s - before.at_s) * 1e3 for before, after in pairwise(longest)]
    return times[trim : len(times) - trim]


def summary(times_ms: Sequence[float]) -> dict[str, Any]:
    """Returns the number of times, their median and their quartiles.

    Raises:
        RuntimeError: fewer than four times.
    """
    if len(times_ms) < 4:
        raise RuntimeError(
            f"only {len(times_ms)} steady steps: too few sequences ran at once, or the run was too short"
        )
    low, middle, high = statistics.quantiles(times_ms, n=4)
    return {"steps": len(times_ms), "ms": round(middle, 4), "low_ms": round(low, 4), "high_ms": round(high, 4)}
