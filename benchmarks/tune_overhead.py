"""Measures what the journal and the worker process cost the CPU demo.

    PYTHONPATH=. .venv/bin/python benchmarks/tune_overhead.py

Whole tunes with and without them cannot be compared: how long a tune samples depends on the noise of its times, which
changes its duration by more than the overhead. So the time is accounted for:

- The start: the time from the call of `tune` until the first bucket can be measured, in fresh processes, in turn with
  and without the worker. Where the worker's import of torch runs beside other work, only what it delays counts. Other
  work on the machine can only prolong a start, so the fastest of each way are compared.
- After the start, in a whole tune of the question of `make demo`: the time of each request to the worker, less the time
  that its bench works in the other process; the notes that it writes before each run are no work.
- All reading and writing of the journal, and the end of the worker.

Exits 1 if that is more than 3 % of the rest of the tune. The machine should be idle; the load average is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import moetune
from moetune.measure import bench, worker
from moetune.spec.regime import Regime
from moetune.store.journal import Journal
from moetune.tuning.events import BucketStarted

MOST = 0.03
"""The largest overhead of journal and worker together, relative."""
EXCHANGES = (worker.Worker, ("_exchange",))
JOURNALS = (Journal, ("read", "note", "note_search", "drop", "remove"))
ENDS = (worker.Worker, ("close",))
WORKS = (bench.Bench, ("__init__", "samples", "check"))
NOTES = (worker._Reporter, ("starts",))


class Account(NamedTuple):
    """What a whole tune needed, in s.

    Attributes:
        tune: from its call to its return.
        exchanges: the requests to the worker after the first.
        work: what the worker's bench did in them, without notes.
        notes: what the notes took in them.
        journal: reading and writing the journal.
        end: ending the worker.
    """

    tune: float
    exchanges: float
    work: float
    notes: float
    journal: float
    end: float

    @property
    def messages(self) -> float:
        """The time of the requests in which the worker neither worked nor wrote notes."""
        return self.exchanges - self.work - self.notes


class _Stop(BaseException):
    """Ends a tune once its first bucket can be measured."""


@contextmanager
def timed(of: tuple[type, Sequence[str]], took: Callable[[float], object]) -> Iterator[None]:
    """Calls `took` with the seconds of each call of some methods in the block."""
    owner, names = of
    real = {name: getattr(owner, name) for name in names}

    def timing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                took(time.perf_counter() - began)

        return call

    for name, method in real.items():
        setattr(owner, name, timing(method))
    try:
        yield
    finally:
        for name, method in real.items():
            setattr(owner, name, method)


def serve(lines: Path, *arguments: Any) -> None:
    """Is the worker process. After each request that its bench has worked on, it appends a line to a file.

    Args:
        lines: the file. A line is a JSON array: the seconds of the work, notes included, and those of the notes.
        arguments: those of `worker._serve`, which does the rest.
    """
    notes: list[float] = []
    with lines.open("a", buffering=1) as file:

        def worked(seconds: float) -> None:
            file.write(json.dumps([seconds, sum(notes)]) + "\n")
            notes.clear()

        with timed(WORKS, worked), timed(NOTES, notes.append):
            worker._serve(*arguments)


def tune(largest: int, store: str, isolate: bool, on_event: Callable[[object], None] | None = None) -> None:
    """Tunes the question of `make demo`, up to `largest` tokens a rank."""
    regime = Regime(ep_size=8, attention_dp=True, tune_max_num_tokens=largest)
    moetune.tune("qwen3-30b-a3b", regime, "torch", store, device="cpu", isolate=isolate, on_event=on_event)


def account(largest: int) -> Account:
    """Runs a whole tune with journal and worker, and returns what it needed."""
    exchanges, journal, end = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "work")
        real, worker._serve = worker._serve, partial(serve, lines)
        try:
            with (
                timed(EXCHANGES, exchanges.append),
                timed(JOURNALS, journal.append),
                timed(ENDS, end.append),
            ):
                began = time.perf_counter()
                tune(largest, os.path.join(folder, "store"), True)
                passed = time.perf_counter() - began
        finally:
            worker._serve = real
        worked = [json.loads(line) for line in lines.read_text().splitlines()]
    if len(worked) != len(exchanges):
        raise SystemExit(f"{len(exchanges)} requests were sent, and {len(worked)} answered: a worker died.")
    work, notes = (sum(each) for each in zip(*worked[1:], strict=True))
    return Account(passed, sum(exchanges[1:]), work - notes, notes, sum(journal), sum(end))


def start_s(largest: int, isolate: bool) -> float:
    """Returns how long it takes until the first bucket can be measured, in s. torch must not have been imported."""
    assert "torch" not in sys.modules
    took: list[float] = []

    def stop(event: object) -> None:
        if isinstance(event, BucketStarted):
            took.append(time.perf_counter() - began)
            raise _Stop

    with tempfile.TemporaryDirectory() as store:
        began = time.perf_counter()
        with suppress(_Stop):
            tune(largest, store, isolate, stop)
    return took[0]


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Returns what a function of this module returns in a process of its own, as JSON keeps it."""
    name = Path(__file__).stem  # not `__main__`, whose functions the worker's process could not find
    code = f"import json, {name}; print(json.dumps({name}.{function.__name__}(*{arguments!r})))"
    path = os.pathsep.join((str(Path(__file__).parent), *map(os.path.abspath, sys.path)))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def starts_s(rounds: int, once: Callable[[bool], float]) -> tuple[list[float], list[float]]:
    """Returns the times until the first bucket can be measured, with the worker and without, in turn."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for isolate in (True, False) if number % 2 else (False, True):
            taken[isolate].append(once(isolate))
            way = "with the worker" if isolate else "without"
            print(f"start {number + 1} of {rounds}, {way}: {taken[isolate][-1]:.2f} s", file=sys.stderr, flush=True)
    return taken[True], taken[False]


def report(tuned: Account, isolated: Sequence[float], alone: Sequence[float]) -> tuple[str, bool]:
    """Returns the table, and whether the overhead is at most `MOST`.

    Args:
        tuned: the account of a whole tune.
        isolated: the times until the first bucket can be measured in s, with the worker.
        alone: as many without it, in turn with the others.
    """
    parts = {
        "start of the worker": min(isolated) - min(alone),
        "messages to the worker and back": tuned.messages,
        "notes of the worker before each run": tuned.notes,
        "journal": tuned.journal,
        "end of the worker": tuned.end,
    }
    overhead_s = sum(parts.values())
    rest_s = tuned.tune - overhead_s
    lines = ["| what | s | of the rest |", "|---|---|---|"]
    for name, part_s in {**parts, "overhead": overhead_s}.items():
        lines.append(f"| {name} | {part_s:.2f} | {part_s / rest_s:+.2%} |")
    lines.append(f"| the rest of the tune | {rest_s:.2f} | |")
    return "\n".join(lines), overhead_s <= MOST * rest_s


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=10, help="how often a start is timed, with the worker and without"
    )
    parser.add_argument("--largest", type=int, default=128, help="tune_max_num_tokens")
    options = parser.parse_args(arguments)
    isolated, alone = starts_s(
        options.rounds, lambda isolate: float(in_fresh_process(start_s, options.largest, isolate))
    )
    text, holds = report(Account(*in_fresh_process(account, options.largest)), isolated, alone)
    print(text, f"\nload average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores", sep="\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
