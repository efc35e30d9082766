"""A backend whose tactics fail in every way in which a kernel can. Compilers start quickly: it imports torch late."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import planted_time
from processes import eventually

from moetune.backends.base import Backend, Candidates, Problem
from moetune.errors import UnsupportedError
from moetune.measure import bench, clock
from moetune.measure.child import MARK_VARIABLE
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch

LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, precision="fp32")


def _raise() -> None:
    raise RuntimeError("planted failure\nwith a second line")


def _exhaust_memory() -> None:
    raise MemoryError("200 GiB")


def _spin() -> None:
    while True:
        pass


def _claim_not_to_be_captured() -> None:
    clock.CpuClock.eager = property(lambda self: {0: "it synchronizes"}, lambda self, found: None)


def _dereference_null() -> None:
    ctypes.string_at(0)


def _exit_noisily() -> None:
    print("to stdout", flush=True)
    print("free(): invalid pointer", file=sys.stderr, flush=True)
    os._exit(3)


def _lose_the_device() -> None:
    bench.is_lost = lambda device: True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


WAYS: Mapping[str, Callable[[], None]] = {
    "raises": _raise,
    "exhausts memory": _exhaust_memory,
    "spins": _spin,
    "segfaults": _dereference_null,
    "exits": _exit_noisily,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "loses the device": _lose_the_device,
    "cannot be captured": _claim_not_to_be_captured,
    "prints": lambda: print("a line on stdout", flush=True),
}
"""Names of tactics, each with what it does when it runs."""


def tactic(name: str, from_run: int = 1) -> Tactic:
    """Does what its name says from its n-th run in a process on; "zeros" is wrong, any other name is right."""
    return Tactic(name=name, from_run=from_run)


@dataclass
class FailingBackend(Backend):
    """Its tactics fail as they are named; preparing fails at `bad_rows`, the reference at `bad_reference_rows`.

    `killed`: how many processes are killed as they begin `prepare`, `reference` or a tactic from its run `from_run` on.
    They are counted in files in `folder`, because processes share nothing else.
    """

    bad_rows: Mapping[int, str] = field(default_factory=dict)
    bad_reference_rows: Mapping[int, str] = field(default_factory=dict)
    killed: Mapping[str | Tactic, int] = field(default_factory=dict)
    folder: str = ""
    name: str = "failing"

    def unavailable(self) -> None:
        return None

    def unsupported(self, layer: MoELayer, regime: Regime) -> None:
        return None

    def environment(self) -> dict[str, str]:
        return {}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        return Candidates((*map(tactic, WAYS), tactic("zeros"), tactic("default")))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        return tactic("default")

    def tolerance(self, layer: MoELayer) -> float:
        return 1e-2

    def prepare(self, problem: Problem) -> FailingRunner:
        planted_time.install()
        if MARK_VARIABLE in os.environ:
            without_torch()
        if (way := self.bad_rows.get(problem.rows)) == "is unsupported":
            raise UnsupportedError("No such rows.", "Ask for others.")
        if way:
            WAYS[way]()
        self.maybe_kill("prepare")
        return FailingRunner(self, self.bad_reference_rows.get(problem.rows))

    def maybe_kill(self, step: str | Tactic) -> None:
        """Kills this process, unless as many as planted have been."""
        if step in self.killed:
            count = os.path.join(self.folder, f"{list(self.killed).index(step)}")
            with open(count, "a") as file:
                file.write(".")
            if os.path.getsize(count) <= self.killed[step]:
                os.kill(os.getpid(), signal.SIGKILL)


def without_torch() -> None:
    """Has this process, a worker, compare outputs as the numbers that they are here. To import torch takes seconds."""
    module = ModuleType("moetune.backends.reference")
    module.__dict__["relative_error"] = lambda result, reference: abs(result.value - reference.value)
    sys.modules["moetune.backends.reference"] = module


@dataclass(frozen=True)
class Output:
    """A tensor of one value. It imports torch only when it is compared in the test's own process."""

    value: float

    def float(self) -> torch.Tensor:
        import torch

        return torch.tensor([self.value], dtype=torch.float32)


@dataclass
class FailingRunner:
    backend: FailingBackend
    bad_reference: str | None
    runs: Counter[Tactic] = field(default_factory=Counter)

    def run(self, tactic: Tactic, draw: int = 0) -> Output:
        self.runs[tactic] += 1
        if self.runs[tactic] >= tactic["from_run"]:
            if way := WAYS.get(str(tactic["name"])):
                way()
            self.backend.maybe_kill(tactic)
        if tactic["name"] == "dies beside others" and len(self.runs) > 1:
            _dereference_null()
        planted_time.spend(1.0)
        return Output(0 if tactic["name"] == "zeros" else 1)

    def reference(self, draw: int = 0) -> Output:
        self.backend.maybe_kill("reference")
        if self.bad_reference:
            WAYS[self.bad_reference]()
        return Output(1)


def problem(rows: int = 4) -> Problem:
    regime = Regime()
    return Problem(LAYER, regime, rows, regime.shard(LAYER), ())


@dataclass
class CompilingBackend(FailingBackend):
    """Compiles by writing the tactic's name and where it ran into `log`; tactics that fail fail here.

    The tactics named in `held` are not done before the file `gate` exists, and none is before `together` have begun.
    """

    log: str = ""
    gate: str = ""
    held: str = ""
    together: int = 1
    parts: int = 1
    bad_parts: Mapping[int, str] = field(default_factory=dict)

    def likely(self, problem: Problem, candidates: Candidates) -> tuple[Tactic, ...]:
        return candidates.tactics

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> list[object]:
        return [(layer.digest, tactic, part) for part in range(self.parts)]

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        with open(self.log, "a") as log:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            log.write(f"{tactic['name']}|{rows}|{capability}|{os.nice(0)}|{seen!r}|{os.getpid()}|{part}\n")
        if way := WAYS.get(self.bad_parts.get(part, str(tactic["name"]))):
            way()
        assert eventually(lambda: self._is_free(str(tactic["name"])))

    def _is_free(self, name: str) -> bool:
        with open(self.log) as log:
            begun = len(log.readlines())
        return begun >= self.together and (name not in self.held or os.path.exists(self.gate))
