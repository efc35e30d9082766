"""Measures what the journal and the worker process cost: the CPU demo with both, with one, and with neither.

    PYTHONPATH=. .venv/bin/python benchmarks/tune_overhead.py --rounds 5

Each round tunes the question of `make demo` once in each way, in an order that turns from round to round. Exits 1 if
the tune with both takes more than 3 % longer than the one with neither. The machine must be idle.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import moetune
from moetune.spec.regime import Regime
from moetune.stats import paired_ratio
from moetune.store.journal import Journal

MOST = 0.03
"""The largest overhead of journal and worker together, relative."""


class Way(NamedTuple):
    """How a tune runs."""

    journal: bool
    worker: bool


WAYS: Mapping[str, Way] = {
    "neither": Way(journal=False, worker=False),
    "journal": Way(journal=True, worker=False),
    "worker": Way(journal=False, worker=True),
    "both": Way(journal=True, worker=True),
}


@contextmanager
def journaled(wanted: bool) -> Iterator[None]:
    """Runs the block with the journal, or with one that writes nothing."""
    real = Journal._append
    if not wanted:
        Journal._append = lambda self, *records: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Journal._append = real  # type: ignore[method-assign]


def tune_s(way: Way, largest: int) -> float:
    """Returns how long a tune takes, in s, from its call to its return."""
    regime = Regime(ep_size=8, attention_dp=True, tune_max_num_tokens=largest)
    with tempfile.TemporaryDirectory() as store, journaled(way.journal):
        began = time.perf_counter()
        moetune.tune("qwen3-30b-a3b", regime, "torch", store, device="cpu", isolate=way.worker)
        return time.perf_counter() - began


def measured(rounds: int, once: Callable[[Way], float]) -> dict[str, list[float]]:
    """Returns the times of each way, one a round. The first way of a round turns from round to round."""
    names, times = list(WAYS), {name: list[float]() for name in WAYS}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(once(WAYS[name]))
            print(f"round {number + 1} of {rounds}, {name}: {times[name][-1]:.1f} s", file=sys.stderr, flush=True)
    return times


def report(times: Mapping[str, Sequence[float]]) -> tuple[str, bool]:
    """Returns the table, and whether the overhead of both is at most `MOST`."""
    lines = ["| way | median s | over neither | 95 % bounds |", "|---|---|---|---|"]
    for name, series in times.items():
        ratio = paired_ratio(series, times["neither"])
        gain = f"{ratio.value - 1:+.1%} | {ratio.low - 1:+.1%} … {ratio.high - 1:+.1%}" if name != "neither" else " | "
        lines.append(f"| {name} | {statistics.median(series):.1f} | {gain} |")
    return "\n".join(lines), paired_ratio(times["both"], times["neither"]).value <= 1 + MOST


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=128, help="tune_max_num_tokens")
    options = parser.parse_args(arguments)
    tune_s(WAYS["neither"], 1)  # imports torch, and warms it up
    text, holds = report(measured(options.rounds, lambda way: tune_s(way, options.largest)))
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
