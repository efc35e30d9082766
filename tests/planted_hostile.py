"""A backend whose tactics do to moetune whatever a kernel's code can do, in the phase of a tune that their name says.

Its workers import no torch, so that they start quickly: problems come without routings, and outputs are numbers.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import planted_time
from planted_failures import Output, without_torch

from moetune.backends.base import Backend, Candidates, Problem
from moetune.errors import MoetuneError, UnsupportedError
from moetune.search.base import Batch
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

FIRST_RUN, TIMING, FINAL, STRESS, COMPILE = PHASES = ("first run", "timing", "final", "stress", "compile")
MILLISECONDS = {"default": 2.0, "fast": 1.0}
USUAL_MS = 1.05
"""The time of a hostile tactic where it runs: it is among the finalists until it fails, and never wins."""
DAEMON = [sys.executable, "-c", "import time; time.sleep(600)  # planted"]
_kept: list[object] = []


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


class UnpicklableError(Exception):
    def __reduce__(self) -> NoReturn:
        raise TypeError("not to be pickled")


class OwnError(MoetuneError):
    """A backend's own class of moetune's errors, which cannot be made again from its message."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class OwnBaseError(BaseException):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def raising(error: Callable[[], BaseException]) -> Callable[[], None]:
    def way() -> None:
        raise error()

    return way


def recurse() -> None:
    recurse()


def descriptors() -> list[int]:
    """The descriptors that the worker has inherited: its streams, the connection and the note."""
    return [int(each) for each in sys.argv[1:3]]


def write_to_all(text: bytes) -> Callable[[], None]:
    def way() -> None:
        for descriptor in (1, 2, *descriptors()):
            os.write(descriptor, text)

    return way


def write_over_the_note() -> None:
    os.pwrite(descriptors()[1], b"\xff" * 4096, 0)


def once(way: Callable[[], None]) -> Callable[[], None]:
    """Does it once in each process."""
    done: list[int] = []

    def first() -> None:
        if os.getpid() not in done:
            done.append(os.getpid())
            way()

    return first


def daemon(then: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def way() -> None:
        subprocess.Popen(DAEMON, start_new_session=True)
        then()

    return way


def fork_a_daemon() -> None:
    if not os.fork():
        os.setsid()
        time.sleep(600)


def fork_and_go_on() -> None:
    os.fork()


def shell_daemon() -> None:
    os.system(f"setsid {DAEMON[0]} -c '{DAEMON[2]}' &")


def leak() -> None:
    _kept.append(bytearray(1 << 20))


def leak_descriptors() -> None:
    _kept.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(3))


def threads() -> None:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def lose_the_folder() -> None:
    folder = Path(f"/dev/shm/planted-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    folder.rmdir()


def abort_noisily() -> None:
    os.write(2, b"\xff\xfe is no UTF-8 \x1b[31m\n")
    os.abort()


def print_noisily() -> None:
    print("a line on stdout", flush=True)
    os.write(1, b"\xff bytes on stdout")
    os.write(2, b"\xff bytes on stderr")


def replace_streams() -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def dereference_null() -> None:
    ctypes.string_at(0)


def spin() -> None:
    while True:
        pass


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def turn_the_clock_back() -> None:
    planted_time.spend(-5.0)


class Behaviour(NamedTuple):
    """What a tactic does, and the regular expression of the reason for which it is excluded; None if it is not."""

    way: Callable[[], None]
    reason: str | None


DIES = "twice"
GARBLED = "the process wrote something else than messages to its connection to moetune"
CLOSED = "the process exited with status 1: it closed its connection to moetune"
BEHAVIOURS: Mapping[str, Behaviour] = {
    "raises": Behaviour(raising(lambda: RuntimeError("planted\nwith a second line")), "^RuntimeError: planted$"),
    "raises what cannot be printed": Behaviour(raising(UnreadableError), "^UnreadableError: its message cannot be"),
    "raises no message": Behaviour(raising(ValueError), "^ValueError$"),
    "raises what is no UTF-8": Behaviour(raising(lambda: ValueError("a\udcff")), r"^ValueError: a\\udcff$"),
    "raises control characters": Behaviour(
        raising(lambda: ValueError("\x1b]0;x\x07")), r"^ValueError: \\x1b]0;x\\x07$"
    ),
    "raises markup": Behaviour(raising(lambda: ValueError("[/bold] [red]")), r"^ValueError: \[/bold\] \[red\]$"),
    "raises a megabyte": Behaviour(raising(lambda: ValueError("x" * 1_000_000)), "^ValueError: x{100,}…$"),
    "raises an odd class": Behaviour(raising(type("a\n[b]", (Exception,), {})), r"^a\\n\[b\]$"),
    "raises a group": Behaviour(raising(lambda: ExceptionGroup("g", [OSError(5, "x")])), "^ExceptionGroup: g"),
    "raises StopIteration": Behaviour(raising(StopIteration), "^StopIteration$"),
    "raises MemoryError": Behaviour(raising(MemoryError), "^out of memory: MemoryError"),
    "raises moetune's error": Behaviour(raising(lambda: UnsupportedError("a", "b")), "^UnsupportedError: a b$"),
    "raises its own error": Behaviour(raising(lambda: OwnError(1, 2)), "^OwnError: 1 and 2$"),
    "raises what cannot be pickled": Behaviour(raising(lambda: UnpicklableError("u")), "^UnpicklableError: u$"),
    "recurses": Behaviour(recurse, "^RecursionError: maximum recursion depth exceeded"),
    "raises SystemExit": Behaviour(raising(lambda: SystemExit(0)), f"status 1: SystemExit: 0.*{DIES}"),
    "raises KeyboardInterrupt": Behaviour(raising(KeyboardInterrupt), f"status 1: KeyboardInterrupt.*{DIES}"),
    "raises its own BaseException": Behaviour(raising(OwnBaseError), f"status 1.*{DIES}"),
    "segfaults": Behaviour(dereference_null, f"killed by SIGSEGV.*{DIES}"),
    "aborts": Behaviour(abort_noisily, r"killed by SIGABRT: �+ is no UTF-8 \\x1b\[31m.*" + DIES),
    "exits with 0": Behaviour(lambda: os._exit(0), f"the process exited with status 0.*{DIES}"),
    "exits with 3": Behaviour(lambda: os._exit(3), f"the process exited with status 3.*{DIES}"),
    "kills itself": Behaviour(lambda: os.kill(os.getpid(), signal.SIGKILL), f"killed by SIGKILL.*{DIES}"),
    "hangs": Behaviour(spin, "^hung: not finished within"),
    "hangs asleep": Behaviour(lambda: time.sleep(600), "^hung: not finished within"),
    "hangs stopped": Behaviour(stop, "^hung: not finished within"),
    "writes text to all descriptors": Behaviour(write_to_all(b"text that is no message\n"), f"{GARBLED}.*{DIES}"),
    "writes half a message": Behaviour(write_to_all(struct.pack("!i", 500) + b"half"), f"{GARBLED}.*{DIES}"),
    "writes a message of others": Behaviour(
        write_to_all(struct.pack("!i", len(pickle.dumps("odd"))) + pickle.dumps("odd")), f"{GARBLED}.*{DIES}"
    ),
    "writes over the note": Behaviour(write_over_the_note, None),
    "closes the connection": Behaviour(lambda: os.close(descriptors()[0]), f"{CLOSED}.*{DIES}"),
    "closes everything": Behaviour(lambda: os.closerange(0, 100), f"exited with status.*{DIES}"),
    "starts a daemon and dies": Behaviour(daemon(lambda: os._exit(4)), f"the process exited with status 4.*{DIES}"),
    "returns None": Behaviour(lambda: None, "^AttributeError: 'NoneType' object has no attribute"),
    "is wrong": Behaviour(lambda: None, "^wrong result: relative error 1.0e"),
    "is NaN": Behaviour(lambda: None, "^wrong result: relative error nan"),
    "turns the clock back": Behaviour(turn_the_clock_back, "^a time of .* µs was read"),
    "is slow": Behaviour(lambda: planted_time.spend(50.0), None),
    "starts a daemon": Behaviour(once(daemon()), None),
    "forks a daemon": Behaviour(once(fork_a_daemon), None),
    "starts a daemon from a shell": Behaviour(once(shell_daemon), None),
    "forks and goes on": Behaviour(once(fork_and_go_on), None),
    "prints": Behaviour(print_noisily, None),
    "replaces the streams": Behaviour(replace_streams, None),
    "ignores SIGTERM": Behaviour(lambda: os.kill(os.getpid(), signal.SIGTERM), None),
    "gets Ctrl-C": Behaviour(lambda: os.kill(os.getpid(), signal.SIGINT), None),
    "drifts": Behaviour(lambda: planted_time.spend(len(_kept) / 1000), None),
    "leaks memory": Behaviour(leak, None),
    "leaks descriptors": Behaviour(leak_descriptors, None),
    "starts threads": Behaviour(once(threads), None),
    "loses the working folder": Behaviour(lose_the_folder, None),
    "enables the collector": Behaviour(gc.enable, None),
}
OUTPUTS = {"returns None": None, "is wrong": 2.0, "is NaN": math.nan}

PLANTED: Mapping[tuple[str, str], str | None] = {
    **{(name, FIRST_RUN): behaviour.reason for name, behaviour in BEHAVIOURS.items() if name not in OUTPUTS},
    **{
        (name, phase): BEHAVIOURS[name].reason
        for phase in (TIMING, FINAL, STRESS)
        for name in ("raises", "segfaults", "hangs", *OUTPUTS)
        if (name, phase) not in {("returns None", STRESS), ("is NaN", STRESS)}
    },
    **{
        (name, COMPILE): "^hung: not compiled within" if name == "hangs" else BEHAVIOURS[name].reason
        for name in (
            "raises",
            "raises what cannot be printed",
            "segfaults",
            "exits with 0",
            "hangs",
            "writes half a message",
        )
    },
}
"""The reason of each planted tactic: what it does, and in which phase."""


def tactic(name: str, phase: str = "") -> Tactic:
    return Tactic(name=name, phase=phase) if phase else Tactic(name=name)


class LightDraw(NamedTuple):
    """A draw without its routing, which is a tensor."""

    kind: str
    rows: int
    stress_factor: int | None


def light(problem: Problem) -> Problem:
    draws: Any = tuple(LightDraw(draw.kind, draw.rows, draw.stress_factor) for draw in problem.draws)
    return replace(problem, draws=draws)


@dataclass
class HostileBackend(Backend):
    """Its tactics are those of `planted`. It also prints in every method that moetune calls in its own process."""

    planted: tuple[tuple[str, str], ...] = tuple(PLANTED)
    name: str = "hostile"

    def _print(self) -> None:
        print("a line of the backend", flush=True)
        os.write(1, b"bytes of the backend\n")

    def unavailable(self) -> None:
        self._print()

    def unsupported(self, layer: MoELayer, regime: Regime) -> None:
        self._print()

    def environment(self) -> dict[str, str]:
        self._print()
        return {}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        self._print()
        return Candidates((*map(tactic, MILLISECONDS), *(tactic(*each) for each in self.planted)))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        self._print()
        return tactic("default")

    def tolerance(self, layer: MoELayer) -> float:
        return 1e-2

    def search(
        self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]
    ) -> Generator[Batch, Mapping[Tactic, float], tuple[Tactic, ...]]:
        """Everything that runs is a finalist, so that it can fail later."""
        times = yield Batch(candidates.tactics)
        return tuple(sorted(times, key=times.__getitem__))

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> list[Tactic]:
        return [tactic] if tactic.get("phase") == COMPILE else []

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        BEHAVIOURS[str(tactic["name"])].way()

    def prepare(self, problem: Problem) -> HostileRunner:
        planted_time.install()
        without_torch()
        return HostileRunner(problem)


@dataclass
class HostileRunner:
    problem: Problem
    runs: Counter[Tactic] = field(default_factory=Counter)

    def run(self, tactic: Tactic, draw: int = 0) -> Any:
        name, phase = str(tactic["name"]), tactic.get("phase")
        self.runs[tactic] += 1
        kind = self.problem.draws[draw].kind
        is_now = (
            phase == FIRST_RUN
            or (phase == TIMING and kind == "search" and self.runs[tactic] > 1)
            or (phase == FINAL and kind == "final")
            or (phase == STRESS and kind == "stress")
        )
        if is_now:
            BEHAVIOURS[name].way()
        planted_time.spend(MILLISECONDS.get(name, USUAL_MS))
        output = OUTPUTS.get(name, 1.0) if is_now else 1.0
        return None if output is None else Output(output)

    def reference(self, draw: int = 0) -> Any:
        return Output(1.0)
