"""Workers that are killed from outside at planted moments cost retries, not tunes, and exclude no tactic that runs.

Tunes a backend of four tactics with planted times until as many workers as asked were killed with SIGKILL. Exits 1 if
a tune fails, chooses another tactic than the fastest, or excludes another tactic than the one that really kills its
process, which is a candidate in every second tune.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetune.backends.base import Backend, Candidates, Problem
from moetune.measure import bench
from moetune.measure.clock import CpuClock
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.tuning.events import Event
from moetune.tuning.tune import tune

if TYPE_CHECKING:
    import torch

LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, precision="fp32")
MILLISECONDS = {"default": 2.0, "fast": 1.0, "middling": 1.5}
KILLER = "killer"
"""The tactic that really kills its process."""
RUNS = (120, 320)
"""The least and the most runs before a run in which a worker is killed.

While a tactic is tried alone it runs at most 97 times. If it is killed then too, it is excluded, as it must be.
"""
OTHERS = ("start", "preparation", "reference", "pause")
"""The other steps in which a worker is killed: before it has the backend, in the other activities, and between them."""

Step = tuple[str, int]
"""A kind of step, and how many steps of this kind pass, that one included, before the kill."""


def planned(kills: int, seed: int) -> tuple[Step, ...]:
    """Returns the moments of the kills. Every second one is in a run, so no four in a row are without a tactic."""
    generator = random.Random(seed)
    others = [OTHERS[number % len(OTHERS)] for number in range(kills // 2)]
    generator.shuffle(others)
    runs = (("run", generator.randint(*RUNS)) for _ in range(kills))
    steps: list[Step] = []
    for number in range(kills):
        steps.append((others[number // 2], 1) if number % 2 else next(runs))
    return tuple(steps)


@dataclass(frozen=True)
class Moments:
    """The plan, and how far it is, in a folder that all workers and their parent share."""

    plan: tuple[Step, ...]
    folder: str

    def passed(self, kind: str) -> bool:
        """Counts a step of this kind. Returns whether its process must be killed now."""
        struck, count = self._state()
        if struck == len(self.plan) or self.plan[struck][0] != kind:
            return False
        hit = count + 1 == self.plan[struck][1]
        self._write("state", [struck + hit, 0 if hit else count + 1])
        return hit

    def wait_to_be_killed(self) -> None:
        """Asks the parent for the kill, and waits for it."""
        self._write("victim", os.getpid())
        time.sleep(600)

    @property
    def struck(self) -> int:
        """How many kills there were."""
        return self._state()[0]

    def victim(self) -> int | None:
        """Returns the process that waits to be killed, if there is one, and forgets it."""
        path = Path(self.folder, "victim")
        if not path.exists():
            return None
        pid = int(path.read_text())
        path.unlink()
        return pid

    def _state(self) -> tuple[int, int]:
        path = Path(self.folder, "state")
        struck, count = json.loads(path.read_text()) if path.exists() else (0, 0)
        return struck, count

    def _write(self, name: str, value: object) -> None:
        path = Path(self.folder, name)
        path.with_suffix(".new").write_text(json.dumps(value))
        path.with_suffix(".new").replace(path)


@dataclass
class KilledBackend(Backend):
    """Its tactics take planted times, and its processes are killed at planted moments."""

    moments: Moments
    tactics: tuple[str, ...]
    name: str = "killed"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Is called in each worker as it starts."""
        self.__dict__.update(state)
        self.step("start")

    def step(self, kind: str) -> None:
        """Waits to be killed if it is time."""
        if self.moments.passed(kind):
            self.moments.wait_to_be_killed()

    def unavailable(self) -> None:
        """Returns None: it runs anywhere."""

    def unsupported(self, layer: MoELayer, regime: Regime) -> None:
        """Returns None: it computes any layer."""

    def environment(self) -> dict[str, str]:
        """Returns no fields."""
        return {}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns all tactics."""
        return Candidates(tuple(Tactic(name=name) for name in self.tactics))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the default."""
        return Tactic(name="default")

    def tolerance(self, layer: MoELayer) -> float:
        """Returns any small error."""
        return 1e-5

    def prepare(self, problem: Problem) -> KilledRunner:
        """Notes the worker's process for a kill in a pause."""
        Path(self.moments.folder, "worker").write_text(str(os.getpid()))
        self.step("preparation")
        return KilledRunner(self, problem)


class KilledRunner:
    """Runs that take no time but a planted one, which the clock of this process reads."""

    def __init__(self, backend: KilledBackend, problem: Problem) -> None:
        self._backend, self._problem = backend, problem
        self._now_ns = 0
        bench.clock_for = lambda device: CpuClock(lambda: self._now_ns)  # type: ignore[attr-defined]  # is imported

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """Returns the right output."""
        name = str(tactic["name"])
        if name == KILLER:
            os.kill(os.getpid(), signal.SIGKILL)
        self._backend.step("run")
        self._now_ns += int(1e6 * MILLISECONDS[name])
        return self._output()

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the right output."""
        self._backend.step("reference")
        return self._output()

    def _output(self) -> torch.Tensor:
        import torch

        return torch.ones(self._problem.rows, self._problem.layer.hidden_size)


@contextmanager
def killing(moments: Moments) -> Iterator[None]:
    """Kills, from this process, the workers that wait to be killed."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.01):
            if (pid := moments.victim()) is not None:
                os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class Tuned:
    """One tune: its kills by kind of step, what it chose and what it excluded."""

    kills: Counter[str]
    has_killer: bool
    chosen: frozenset[str]
    excluded: frozenset[str]
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the fastest tactic won every bucket, and exactly the tactic that kills its process is excluded."""
        killers = frozenset({KILLER} if self.has_killer else ())
        return not self.error and self.chosen == {"fast"} and self.excluded == killers


def tuned(moments: Moments, has_killer: bool, ladder: str) -> Tuned:
    """Tunes once, in workers that are killed."""

    def listen(event: Event) -> None:
        if moments.passed("pause"):
            os.kill(int(Path(moments.folder, "worker").read_text()), signal.SIGKILL)

    before = moments.struck
    backend = KilledBackend(moments, (*MILLISECONDS, *[KILLER] * has_killer))
    regime = Regime(ep_size=2, attention_dp=True, ladder=ladder, draws=4)
    chosen: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    error = ""
    with tempfile.TemporaryDirectory() as store, killing(moments):
        try:
            choices = tune(LAYER, regime, backend, store, device="cpu", on_event=listen).choices
            chosen = frozenset(str(choice.tactic["name"]) for choice in choices)
            excluded = frozenset(str(each.tactic["name"]) for choice in choices for each in choice.rejected)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    kills = Counter(kind for kind, _ in moments.plan[before : moments.struck])
    return Tuned(kills, has_killer, chosen, excluded, error)


def tunes(kills: int, seed: int, ladder: str = "4,8") -> list[Tuned]:
    """Tunes until there were that many kills. Every second tune, the first one too, has the tactic `KILLER`."""
    with tempfile.TemporaryDirectory() as folder:
        moments = Moments(planned(kills, seed), folder)
        done: list[Tuned] = []
        while moments.struck < kills and not (done and done[-1].error):
            done.append(tuned(moments, len(done) % 2 == 0, ladder))
    return done


def report(done: Sequence[Tuned]) -> str:
    """Returns the tunes as a table in Markdown, and a line that counts them."""
    kinds = ("run", *OTHERS)
    lines = [
        f"| tune | {' | '.join(f'killed in a {kind}' for kind in kinds)} | chosen | excluded |",
        f"|---|{'---|' * len(kinds)}---|---|",
    ]
    for number, one in enumerate(done, start=1):
        counts = " | ".join(str(one.kills[kind] or "") for kind in kinds)
        chosen = one.error or ", ".join(sorted(one.chosen))
        lines.append(f"| {number} | {counts} | {chosen} | {', '.join(sorted(one.excluded)) or '–'} |")
    total = sum((one.kills for one in done), Counter[str]())
    right = sum(one.is_right for one in done)
    killers = sum(one.has_killer for one in done)
    each = ", ".join(f"{total[kind]} in a {kind}" for kind in kinds)
    lines += [
        "",
        f"{total.total()} kills ({each}). {right} of {len(done)} tunes ended with the fastest tactic and excluded no "
        f"other than `{KILLER}`, which was a candidate of {killers}.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tunes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many workers are killed  [default: 40]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments  [default: 0]")
    given = parser.parse_args(arguments)
    done = tunes(given.kills, given.seed)
    print(report(done))
    return 0 if all(one.is_right for one in done) else 1


if __name__ == "__main__":
    import killed_workers  # workers import the backend's class from a module, not from a script

    sys.exit(killed_workers.main())
