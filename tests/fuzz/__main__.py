"""`python -m tests.fuzz`: runs every target, or some, and prints a line for each. Run it in the repository's folder.

Without the names of targets it also reads the inputs that are made to cost time or memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.bombs import BOMBS, cost_of
from fuzz.run import MOST_SECONDS, run
from fuzz.targets import TARGETS


def main() -> int:
    """Prints for each target the number of inputs, how many were read, the worst time and the memory. 1: findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs a target (default: 20000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="the most seconds a target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that were found")
    given = parser.parse_args()
    os.environ["MOETUNE_PACKAGED_PROFILES"] = "0"
    os.fsync = lambda descriptor: None
    total, found = 0, 0
    print(f"{'target':<16} {'inputs':>8} {'read':>8} {'worst':>9} {'memory':>9}  findings", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in given.targets or TARGETS:
            report = run(TARGETS[name], Path(folder), seed=given.seed, inputs=given.inputs, seconds=given.seconds)
            total, found = total + report.inputs, found + len(report.findings)
            print(
                f"{name:<16} {report.inputs:>8} {report.accepted:>8} {report.worst_s * 1e3:>6.0f} ms "
                f"{report.grown_bytes / 1e6:>6.0f} MB  {len(report.findings)}",
                flush=True,
            )
            for number, (title, (text, content)) in enumerate(report.findings.items()):
                print(f"--- {title}\n{text}\ninput: {content[:300]!r}", flush=True)
                if given.keep:
                    given.keep.mkdir(parents=True, exist_ok=True)
                    (given.keep / f"{name}-{number}").write_bytes(content)
        if not given.targets:
            costs = {name: cost_of(name, Path(tempfile.mkdtemp(dir=folder))).seconds for name in BOMBS}
            slow = {name: seconds for name, seconds in costs.items() if seconds > MOST_SECONDS}
            total, found = total + len(costs), found + len(slow)
            print(f"{'bombs':<16} {len(costs):>8} {'':>8} {max(costs.values()) * 1e3:>6.0f} ms {'':>9}  {len(slow)}")
            for name, seconds in slow.items():
                print(f"--- {name}: {seconds:.2f} s")
    print(f"{total} inputs, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
