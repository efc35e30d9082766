"""Signals at random moments of a tune: none is lost, none is a traceback or a damaged store, nothing is left running.

    PYTHONPATH=. python benchmarks/interrupted.py [--sigint 300] [--others 30]

Starts `moetune tune` on the `torch` backend again and again, each time with an empty store, and sends it one signal at
a random moment between moetune's first line and the end of the process. Exits 1 if a run does not end as it must.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetune.store.profile import Profile
from moetune.store.store import Store

CONFIG = {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 128,
    "moe_intermediate_size": 128, "hidden_act": "silu", "norm_topk_prob": True, "torch_dtype": "float32",
}  # fmt: skip
WORDS = ("--backend", "torch", "--device", "cpu", "--ladder", "1,16", "--draws", "1")
MARK = "MOETUNE_BENCHMARK"
"""An environment variable by which processes that outlive a run are found."""
LONGEST_S = 120.0
"""A run that has not ended this long after its signal has lost it."""
GONE_S = 5.0
"""How long the children of a run may take to end after it."""


@dataclass(frozen=True)
class Trial:
    """One signal and how the run ended: its return code, what it wrote to stderr, and what it left behind.

    `seconds` is the time from the signal to the end. `hung` says that the run did not end.
    """

    number: signal.Signals
    returncode: int
    stderr: str
    seconds: float
    hung: bool = False
    orphans: int = 0
    damaged: int = 0

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the end; empty if it is as it must be."""
        found = {
            "lost": self.hung or self.returncode == 0,
            "traceback": "Traceback" in self.stderr,
            "reported as a bug": "bug in moetune" in self.stderr,
            "another exit code": not self.hung and self.returncode not in (0, 128 + self.number, -self.number),
            "orphans": self.orphans > 0,
            "damaged store": self.damaged > 0,
        }
        return tuple(name for name, is_so in found.items() if is_so)


def trial(command: Sequence[str], number: signal.Signals, after_s: float, store: Path) -> Trial | None:
    """Starts the command and sends it a signal `after_s` seconds after its first line. None if it had ended by then."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, MARK: mark}, start_new_session=True
        )
        try:
            while not handles(process.pid, signal.SIGTERM) and process.poll() is None:
                time.sleep(0.001)
            time.sleep(after_s)
            if has_ended(process.pid):
                return None
            process.send_signal(number)
            sent = time.monotonic()
            hung = False
            try:
                process.wait(LONGEST_S)
            except subprocess.TimeoutExpired:
                hung = True
            seconds = time.monotonic() - sent
        finally:
            process.kill()
            process.wait()
        stderr.seek(0)
        said = stderr.read()
    damaged = sum(not isinstance(found, Profile) for _, found in Store(store).profiles())
    return Trial(number, process.returncode, said, seconds, hung, len(left(mark)), damaged)


def handles(pid: int, number: signal.Signals) -> bool:
    """Returns whether a process has a handler for a signal, as moetune has from its first line on."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> (number - 1) & 1)


def has_ended(pid: int) -> bool:
    """Returns whether a child has ended; it may not have been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def left(mark: str) -> list[int]:
    """Returns the processes of a run that are still there after `GONE_S`."""
    deadline = time.monotonic() + GONE_S
    while (found := list(marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def marked(mark: str) -> Iterable[int]:
    """Yields the processes that have the mark in their environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                yield int(path.parent.name)
        except OSError:
            continue


def report(trials: Sequence[Trial]) -> str:
    """Returns a table in Markdown with a row for each kind of signal, and what went wrong."""
    lines = [
        "| signal | runs | ended with its exit code | killed by it while Python ended | faults | median s | most s |",
        "|---|---|---|---|---|---|---|",
    ]
    for number in sorted({each.number for each in trials}, key=lambda one: one.name != "SIGINT"):
        mine = [each for each in trials if each.number == number]
        by_code = sum(each.returncode == 128 + number for each in mine)
        by_kill = sum(each.returncode == -number and not each.hung for each in mine)
        faults = [fault for each in mine for fault in each.faults]
        named = ", ".join(f"{fault}: {faults.count(fault)}" for fault in sorted(set(faults))) or "0"
        seconds = [each.seconds for each in mine]
        times = f"{statistics.median(seconds):.2f} | {max(seconds):.2f}"
        lines.append(f"| {number.name} | {len(mine)} | {by_code} | {by_kill} | {named} | {times} |")
    for each in trials:
        if each.faults:
            lines += ["", f"{each.number.name}: {', '.join(each.faults)}; {each.returncode}; {each.stderr[-500:]!r}"]
    return "\n".join(lines)


def planned(sigint: int, others: int, seed: int) -> list[tuple[signal.Signals, float]]:
    """Returns the signals in a random order, each with its moment as a share of an uninterrupted run."""
    generator = random.Random(seed)
    numbers = [signal.SIGINT] * sigint + [signal.SIGTERM, signal.SIGHUP] * others
    generator.shuffle(numbers)
    return [(number, generator.random()) for number in numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sigint", type=int, default=300, help="how many SIGINTs  [default: 300]")
    parser.add_argument("--others", type=int, default=30, help="how many SIGTERMs and SIGHUPs each  [default: 30]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments  [default: 0]")
    given = parser.parse_args(arguments)
    for ignored in (signal.SIGINT, signal.SIGHUP):  # as in the background of a shell; moetune would ignore them too
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, signal.SIG_DFL)
    trials: list[Trial] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(CONFIG))

        def command(store: Path) -> list[str]:
            return [sys.executable, "-m", "moetune", "tune", "--model", str(config), *WORDS, "--store", str(store)]

        started = time.monotonic()
        subprocess.run(command(Path(folder, "whole")), check=True, capture_output=True)
        whole_s = time.monotonic() - started
        for index, (number, share) in enumerate(planned(given.sigint, given.others, given.seed)):
            done = None
            while done is None:  # the run had ended before: an earlier moment
                store = Path(folder, f"{index}-{share:.6f}")
                done = trial(command(store), number, share * whole_s, store)
                share /= 2
            trials.append(done)
            if sys.stderr.isatty():
                print(f"{index + 1} signals, {sum(bool(each.faults) for each in trials)} faults", file=sys.stderr)
    print(report(trials))
    print(f"\nAn uninterrupted run took {whole_s:.1f} s, all runs {time.monotonic() - begin:.0f} s.")
    return 1 if any(each.faults for each in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
