"""Times `moetune --help` and `moetune COMMAND --help`, from the start of the process to its end.

    python benchmarks/first_output.py

Each command is run 15 times, and the commands alternate. The goal is a median below 200 ms of wall time on an idle
machine. Exits 1 if one misses it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = ("", "tune", "plan", "models", "check", "batch", "dep-bench")
RUNS = 15
GOAL_MS = 200.0


def wall_ms(words: list[str]) -> float:
    """Returns how long one process took to print its help, in milliseconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "moetune", *words, "--help"], check=True, stdout=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - began)


def main() -> int:
    times: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(RUNS):
        for command, of in times.items():
            of.append(wall_ms(command.split()))
    for command, of in times.items():
        low, median, high = statistics.quantiles(of, n=4)
        print(f"moetune {command:<10} median {median:5.0f} ms   quartiles {low:.0f} to {high:.0f} ms")
    return int(max(map(statistics.median, times.values())) > GOAL_MS)


if __name__ == "__main__":
    sys.exit(main())
