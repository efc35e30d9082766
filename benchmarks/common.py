"""The parts that benchmarks share: the loads by name, a journal that resumes, and times of interleaved calls."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetune.measure.clock import Clock, CpuClock, CudaClock, TimedCall

LOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "allgather": {"dispatch": "allgather"},
    "packed": {"layout": "packed"},
    "deduplicated": {"layout": "deduplicated"},
    "slot": {"layout": "slot"},
    "pool": {"layout": "pool"},
}
"""The fields of a `Regime` that produce each load."""


class Journal:
    """A file of JSON lines that are appended as they are measured, so that a stopped run can resume.

    An incomplete line of a killed run is skipped. The next line after it begins on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.lines: list[dict[str, Any]] = [line for line in map(_parsed, text.splitlines()) if line is not None]
        self._torn = bool(text) and not text.endswith("\n")

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """Returns the last line with these values, or None if there is none."""
        return next((line for line in reversed(self.lines) if fields.items() <= _flat(line).items()), None)

    def add(self, **fields: Any) -> dict[str, Any]:
        """Appends one line, and returns it in the form in which a later run reads it."""
        line: dict[str, Any] = json.loads(json.dumps(fields))
        with self.path.open("a") as file:
            file.write("\n" * self._torn + json.dumps(line, separators=(",", ":")) + "\n")
        self._torn = False
        self.lines.append(line)
        return line


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not isinstance(value, list | dict)}


def series_us(calls: Sequence[TimedCall], draws: Sequence[int], clock: Clock | None = None) -> list[list[float]]:
    """Warms up each call on the first draw, and times all calls interleaved.

    Args:
        calls: functions of a draw's number.
        draws: the draw of each round.
        clock: None means a CUDA clock.

    Returns:
        [call][round] in µs.
    """
    clock = clock or CudaClock("cuda")
    for call in calls:
        clock.warm_up(call, draws[0])
    return clock.paired_samples(calls, draws)


def means_us(
    calls: Sequence[TimedCall], draws: Sequence[int], rounds: int = 5, clock: Clock | None = None
) -> list[float]:
    """Returns the mean over the draws of each call's median over interleaved rounds, in µs.

    A call that is given twice is an A/A pair.
    """
    return [
        statistics.fmean(statistics.median(times[at :: len(draws)]) for at in range(len(draws)))
        for times in series_us(calls, list(draws) * rounds, clock)
    ]


def wall_us(calls: Sequence[TimedCall], draws: Sequence[int]) -> list[list[float]]:
    """Returns [call][round] in µs, measured on the host. A call on a GPU must wait for the GPU itself."""
    return series_us(calls, draws, CpuClock())


def quartiles_line(name: str, values: Sequence[float], width: int = 32) -> str:
    """Returns one line with the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{name:{width}s} median {median:8.3f}   quartiles {low:.3f} … {high:.3f}"
