"""Runs a target: counts its inputs, and keeps those that raise something else, or take too long."""

from __future__ import annotations

import random
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.mutate import mutated
from moetune.errors import MoetuneError
from moetune.quoting import MOST_QUOTED

MOST_SECONDS = 1.0
"""Of processor time, for one input on an idle machine: what `python -m tests.fuzz` asks for."""
ANYWHERE_SECONDS = 60.0
"""The same for tests, which coverage and other work slow down. An input that costs exponential time takes hours."""
MOST_BYTES = 200_000_000
MOST_MESSAGE = 40 * MOST_QUOTED
"""An error quotes a few values and names a few others. Without a bound it would be as long as its input."""


@dataclass(frozen=True)
class Target:
    """One reader. `read` returns normally or raises moetune's own errors; it is given an empty folder of its own."""

    name: str
    seeds: Sequence[bytes]
    read: Callable[[bytes, Path], None]


@dataclass
class Report:
    """What happened: the number of inputs, of those that were read without an error, and what was found."""

    name: str
    inputs: int = 0
    accepted: int = 0
    worst_s: float = 0.0
    grown_bytes: int = 0
    findings: dict[str, tuple[str, bytes]] = field(default_factory=dict)


def run(
    target: Target,
    folder: Path,
    *,
    seed: int,
    inputs: int,
    seconds: float = float("inf"),
    most_seconds: float = MOST_SECONDS,
) -> Report:
    """Gives a target mutated inputs, the unchanged seeds first. Input number n of a seed is always the same.

    Args:
        target: the reader.
        folder: a folder of its own.
        seed: decides the inputs.
        inputs: how many.
        seconds: after this time it ends.
        most_seconds: an input that costs more processor time is a finding.
    """
    report = Report(target.name)
    ends, before = time.monotonic() + seconds, peak_bytes()
    for number in range(inputs):
        if time.monotonic() > ends:
            break
        rng = random.Random(f"{target.name} {seed} {number}")
        content = target.seeds[number] if number < len(target.seeds) else mutated(rng, target.seeds)
        _give(target, content, folder, report, most_seconds)
    report.grown_bytes = peak_bytes() - before
    return report


def _give(target: Target, content: bytes, folder: Path, report: Report, most_seconds: float) -> None:
    began = time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(content, folder)
        report.accepted += 1
    except MoetuneError as error:
        if len(error.message) > MOST_MESSAGE or len(error.hint) > MOST_MESSAGE:
            report.findings.setdefault(f"an error of {len(str(error))} characters", (str(error)[:500], content))
    except Exception as error:
        lines = traceback.extract_tb(error.__traceback__)
        ours = [line for line in lines if "moetune" in line.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        report.findings.setdefault(f"{type(error).__name__} at {where}", (traceback.format_exc()[-1500:], content))
    took = time.thread_time() - began
    report.inputs += 1
    report.worst_s = max(report.worst_s, took)
    if took > most_seconds:
        report.findings.setdefault("too slow", (f"{took:.2f} s", content))


def peak_bytes() -> int:
    """Returns the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
