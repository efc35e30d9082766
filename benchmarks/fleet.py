"""How much faster a batch is on several workers of a local Ray than on one.

Without --file the kernels only wait, as a process does whose GPU works, so that workers share no core: what is left is
what the fleet itself costs. With --file it is a real batch on this machine's GPUs; each number of them measures all of
the file, into a store of its own. Exits 1 if the speedup over one worker is less than 70 % of the number of workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moetune.backends.base import Backend, Candidates, Problem
from moetune.fleet.fleet import Fleet
from moetune.fleet.ray_cluster import RayCluster
from moetune.fleet.run import run
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.store import Store
from moetune.tuning.batch_run import Answer

LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, precision="fp32")
WAITS_S = {"default": 2e-3, "fast": 1e-3, "slow": 4e-3, "slower": 8e-3}
LEAST = 0.7
"""The least speedup, relative to the number of workers."""


class WaitingRunner:
    """Waits instead of computing."""

    def __init__(self, problem: Problem) -> None:
        self._output = torch.ones(problem.rows, problem.layer.hidden_size)

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """Waits as long as the tactic takes."""
        time.sleep(WAITS_S[str(tactic["name"])])
        return self._output

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the output of every tactic."""
        return self._output


class WaitingBackend(Backend):
    """A backend whose kernels wait."""

    name = "waiting"

    def unavailable(self) -> tuple[str, str] | None:
        """Returns None: it runs everywhere."""
        return None

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns None: it computes nothing."""
        return None

    def environment(self) -> dict[str, str]:
        """Returns no field."""
        return {}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns a tactic for each time of waiting."""
        return Candidates(tuple(Tactic(name=name) for name in WAITS_S))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the default tactic."""
        return Tactic(name="default")

    def tolerance(self, layer: MoELayer) -> float:
        """Returns a tolerance that equal outputs meet."""
        return 1e-5

    def prepare(self, problem: Problem) -> WaitingRunner:
        """Returns a runner that waits."""
        return WaitingRunner(problem)


def waited_s(workers: int, jobs: int, buckets: int) -> float:
    """Returns how long a batch of questions takes whose kernels wait, without the start of Ray and of the workers."""
    backend = WaitingBackend()
    ladder = ",".join(str(4 << number) for number in range(buckets))
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory() as folder, RayCluster("local", local_gpus=workers) as cluster:
        fleet = Fleet(cluster, [backend])
        store = Store(folder, packaged=folder)
        regimes = [Regime(ep_size=2, ladder=ladder, draws=2, seed=seed) for seed in range(jobs)]
        asked = [fleet.questions(LAYER, regime, [backend], store)[0] for regime in regimes]
        began = time.monotonic()
        run(
            dict(enumerate(asked, 1)), fleet, lambda number, event: None, lambda number, where: None, answers.append,
            print, isolate=False,
        )  # fmt: skip
        seconds = time.monotonic() - began
    if failed := [answer.failed for answer in answers if answer.failed]:
        raise SystemExit(f"{len(failed)} questions failed. The first: {failed[0]}")
    return seconds


def measured_s(gpus: int, file: Path) -> float:
    """Returns how long `moetune batch FILE` takes on the first GPUs of this machine, into an empty store."""
    visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    visible = (visible or list(map(str, range(torch.cuda.device_count()))))[:gpus]
    if len(visible) < gpus:
        raise SystemExit(f"{gpus} GPUs are asked for, and {len(visible)} are here.")
    with tempfile.TemporaryDirectory() as store:
        done = subprocess.run(
            [sys.executable, "-m", "moetune", "batch", file, "--ray", "local", "--store", store, "--json"],
            stdout=subprocess.PIPE,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible), "MOETUNE_PACKAGED_PROFILES": "0"},
        )
    if done.returncode:
        raise SystemExit(f"moetune batch ended with exit code {done.returncode}.")
    return float(json.loads(done.stdout)["seconds"])


def lines(seconds: Mapping[int, float]) -> list[str]:
    """Returns a Markdown table of the times by the number of workers, the first of which is the base of the speedup."""
    base = next(iter(seconds.values()))
    table = ["| workers | seconds | speedup |", "|---|---|---|"]
    return table + [f"| {workers} | {each:.1f} | {base / each:.2f}× |" for workers, each in seconds.items()]


def is_enough(seconds: Mapping[int, float]) -> bool:
    """Returns whether every number of workers is `LEAST` times as much faster than the first as it has more workers."""
    (first, base), *others = seconds.items()
    return all(base / each >= LEAST * workers / first for workers, each in others)


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 3], help="numbers of workers, or of GPUs")
    parser.add_argument("--jobs", type=int, default=12, help="questions of the batch that waits")
    parser.add_argument("--buckets", type=int, default=8, help="buckets of each of its questions")
    parser.add_argument("--file", type=Path, help="a real batch, for this machine's GPUs")
    given = parser.parse_args(words)
    if given.file:
        seconds = {workers: measured_s(workers, given.file) for workers in given.workers}
    else:
        seconds = {workers: waited_s(workers, given.jobs, given.buckets) for workers in given.workers}
    print("\n".join(lines(seconds)))
    return 0 if is_enough(seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
