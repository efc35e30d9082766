"""Tunes that are killed at random moments go on where they stopped, and end with the uninterrupted profile.

Tunes a backend of planted times on the CPU, each run in a forked process that is killed with SIGKILL at a random
moment, until there were as many kills as asked; then the last tune ends. Exits 1 if a restart repeats more than the
measurement or the final comparison that was in flight, if a profile differs from the uninterrupted one, if a stored
choice is lost or a file damaged, or if a temporary file, a journal or a process is left over.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetune.backends.base import Backend, Candidates, Problem
from moetune.measure import bench
from moetune.measure.clock import CpuClock
from moetune.search.coordinate import coordinate, promising
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning.bucket_tuner import BucketTuner
from moetune.tuning.tune import tune

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from moetune.search.base import Batch, Search, Times
    from moetune.store.profile import Choice

LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, precision="fp32")
SIDE = 12
"""A tactic has two coordinates with this many values each."""
BROKEN = 5
"""Tactics with this value of both coordinates fail."""
LADDER = "1,4,16,64"
MARK = "MOETUNE_KILLED_TUNES"
"""The environment variable by which the processes of a tune are found."""
ORPHANS_S = 20.0
"""How long a killed run's worker processes may live on, on a busy machine."""


class PlantedBackend(Backend):
    """Its tactics take planted times, which depend on the row count. It is searched as FlashInfer's backend is."""

    name = "planted"

    def unavailable(self) -> None:
        """Returns None: it runs anywhere."""

    def unsupported(self, layer: MoELayer, regime: Regime) -> None:
        """Returns None: it computes any layer."""

    def environment(self) -> dict[str, str]:
        """Returns no fields."""
        return {}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns all pairs of values."""
        return Candidates(tuple(Tactic(first=one, second=two) for one in range(SIDE) for two in range(SIDE)))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the default."""
        return Tactic(first=0, second=0)

    def tolerance(self, layer: MoELayer) -> float:
        """Returns any small error."""
        return 1e-5

    def search(self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]) -> Search:
        """Returns a coordinate descent."""
        return coordinate(candidates.tactics, starts=warm_starts, turn=problem.rows.bit_length())

    def promising(self, times_us: Mapping[Tactic, float]) -> Sequence[Tactic]:
        """Returns the tactics near the best of their line."""
        return promising(times_us)

    def prepare(self, problem: Problem) -> PlantedRunner:
        """Returns the runs of one bucket."""
        return PlantedRunner(problem)


class PlantedRunner:
    """Runs that take no time but a planted one, which the clock of this process reads."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._now_ns = 0
        bench.clock_for = lambda device: CpuClock(lambda: self._now_ns)  # type: ignore[attr-defined]  # is imported

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """Returns the right output."""
        one, two = int(tactic["first"]), int(tactic["second"])
        if one == two == BROKEN:
            raise RuntimeError("planted failure")
        best = self._problem.rows.bit_length() + 2
        self._now_ns += 1_000_000 + 50_000 * (abs(one - best) + abs(two - SIDE + best))
        return self.reference(draw)

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the right output."""
        import torch

        return torch.ones(self._problem.rows, self._problem.layer.hidden_size)


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """Appends a line to `log` when a batch or the final comparisons of a bucket begin."""
    measure, choose = BucketTuner._measure, BucketTuner.choose

    def note(*step: object) -> None:
        with log.open("ab", buffering=0) as file:
            file.write(f"{step[0]} {hashlib.sha1(repr(step).encode()).hexdigest()}\n".encode())

    def measure_noted(self: BucketTuner, batch: Batch) -> Times:
        note("batch", self._bucket.rows, batch.rounds, batch.tactics)
        return measure(self, batch)

    def choose_noted(self: BucketTuner, finalists: Sequence[Tactic], *more: Callable[[], None]) -> Choice:
        note("final", self._bucket.rows)
        return choose(self, finalists, *more)

    BucketTuner._measure = measure_noted  # type: ignore[method-assign,assignment]
    BucketTuner.choose = choose_noted  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        BucketTuner._measure, BucketTuner.choose = measure, choose  # type: ignore[method-assign]


@dataclass
class Counts:
    """What happened to all tunes.

    Attributes:
        kills, tunes: how many there were.
        steps: the batches and final comparisons that were begun.
        in_flight: those of them that repeat one during which a run was killed.
        repeated: those that repeat another.
        different: profiles that differ from the uninterrupted one.
        damaged, lost: files that cannot be read after a kill, and choices that were stored before it and are no more.
        files, processes: temporary files and journals after a tune, and processes of killed runs, that are left over.
        failed: runs that ended with an error.
    """

    kills: int = 0
    tunes: int = 0
    steps: int = 0
    in_flight: int = 0
    repeated: int = 0
    different: int = 0
    damaged: int = 0
    lost: int = 0
    files: int = 0
    processes: int = 0
    failed: int = 0

    @property
    def is_right(self) -> bool:
        """Whether nothing was lost, and nothing measured again that was not in flight."""
        wrong = (self.repeated, self.different, self.damaged, self.lost, self.files, self.processes, self.failed)
        return not any(wrong) and self.in_flight <= self.kills

    def __str__(self) -> str:
        return (
            f"{self.kills} kills in {self.tunes} tunes. {self.steps} batches and final comparisons were begun: "
            f"{self.in_flight} of them again, because a run was killed amid them, and {self.repeated} others again. "
            f"{self.tunes - self.different} profiles equal the uninterrupted one. Damaged files: {self.damaged}. Lost "
            f"choices: {self.lost}. Files left over: {self.files}. Processes left over: {self.processes}. Runs that "
            f"failed: {self.failed}."
        )


@dataclass
class Tunes:
    """Tunes in forked processes.

    Attributes:
        isolate: kernels run in a worker process.
        generator: chooses the moments.
        counts: what happened so far.
    """

    isolate: bool
    generator: random.Random
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:

        _environment()
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                assert self._run(Path(folder), None)
                self._duration_s = time.monotonic() - began
                self._whole = _stored(Path(folder))

    def kill(self, kills: int) -> Counts:
        """Tunes until that many runs were killed and the last tune has ended."""
        while self.counts.kills < kills:
            with tempfile.TemporaryDirectory() as folder:
                self._tune(Path(folder), kills)
        return self.counts

    def _tune(self, folder: Path, kills: int) -> None:
        """Tunes once, killed again and again until a run ends before its moment."""
        begun: list[str] = []
        while True:
            before = _stored(folder)
            is_last = self.counts.kills == kills
            ended = self._run(folder, None if is_last else self.generator.uniform(0, self._duration_s))
            steps = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
            self._count_steps(begun, steps[len(begun) :])
            begun = steps
            self._count_damage(folder, before)
            if ended:
                break
            self.counts.kills += 1
        self.counts.tunes += 1
        self.counts.different += _stored(folder) != self._whole
        self.counts.files += sum(path.name != ".lock" and path.suffix != ".json" for path in _files(folder))

    def _count_steps(self, before: Sequence[str], steps: Sequence[str]) -> None:
        again = [step for number, step in enumerate(steps) if step in before or step in steps[:number]]
        in_flight = [step for step in again if before and step == before[-1]][:1]
        self.counts.steps += len(steps)
        self.counts.in_flight += len(in_flight)
        self.counts.repeated += len(again) - len(in_flight)

    def _count_damage(self, folder: Path, before: Sequence[object]) -> None:
        store = Store(folder / "store", folder / "none")
        self.counts.damaged += sum(not isinstance(found, Profile) for _, found in store.profiles())
        for path in _files(folder):
            if path.name.endswith(".journal.jsonl"):
                journal = store.journal(LAYER, _regime(), PlantedBackend.name, _environment())
                self.counts.damaged += journal.path != path or len(journal.read().unread)
        now = _stored(folder)
        self.counts.lost += sum(choice not in now for choice in before)

    def _run(self, folder: Path, moment_s: float | None) -> bool:
        """Runs a tune in a forked process, killed after `moment_s`. Returns whether it ended by itself before."""
        os.environ[MARK] = mark = f"{os.getpid()}-{self.counts.tunes}-{self.counts.kills}"
        if not (process := os.fork()):
            _child(folder, self.isolate)
        if moment_s is not None:
            time.sleep(moment_s)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        self.counts.processes += _left_over(mark) if self.isolate else 0
        if killed := os.WIFSIGNALED(status):
            return not killed
        self.counts.failed += os.waitstatus_to_exitcode(status) != 0
        return True


def _regime() -> Regime:
    return Regime(ep_size=2, attention_dp=True, ladder=LADDER, draws=4)


def _environment() -> Any:
    from moetune.measure.probe import environment

    return environment(PlantedBackend(), "cpu")


def _child(folder: Path, isolate: bool) -> None:
    """Tunes, and ends this process."""
    code = 1
    try:
        with logged(folder / "log"):
            store = Store(folder / "store", folder / "none")
            tune(LAYER, _regime(), PlantedBackend(), store, device="cpu", isolate=isolate)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / "store").rglob("*") if path.is_file()]


def _stored(folder: Path) -> list[dict[str, Any]]:
    """Returns the stored choices, without the times at which they were measured."""
    profiles = [found for _, found in Store(folder / "store", folder / "none").profiles()]
    choices = [choice for found in profiles if isinstance(found, Profile) for choice in found.choices]
    return [choice.model_dump(exclude={"measured_at"}) for choice in choices]


def _left_over(mark: str) -> int:
    """Returns how many processes of a run still live after `ORPHANS_S`."""
    end = time.monotonic() + ORPHANS_S
    while (living := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return living


def _marked(mark: str) -> int:
    wanted, living = f"{MARK}={mark}".encode(), 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            living += wanted in path.read_bytes().split(b"\0")
        except OSError:
            continue
    return living


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tunes and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many runs are killed  [default: 200]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments  [default: 0]")
    parser.add_argument("--isolate", action="store_true", help="run kernels in worker processes, as `tune` does")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    counts = Tunes(given.isolate, random.Random(given.seed)).kill(given.kills)
    print(f"{counts} {time.monotonic() - began:.0f} s.")
    return 0 if counts.is_right else 1


if __name__ == "__main__":
    import killed_tunes  # workers import the backend's class from a module, not from a script

    sys.exit(killed_tunes.main())
