"""`Compilers` compiles tactics in other processes while the GPU measures earlier ones."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from multiprocessing.connection import Pipe, wait
from typing import Any, Self

from moetune.backends.base import Backend
from moetune.measure.child import Channel, Child, GarbledError, kill_all
from moetune.measure.reasons import both, reason_of
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

NICENESS = 10
RESERVE = 3
"""One process out of this many is kept free for tactics that a caller waits for."""
STARTS = 4
"""How often a process is started for one job before the job fails because the processes die as they start."""
START_S = 300.0
"""A process that has not acknowledged a job within this time is killed, and the job fails."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def capability_of(device: str) -> tuple[int, int] | None:
    """Returns the compute capability of a CUDA device, or None for a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_capability(device)


def most_processes() -> int:
    """Returns how many processes compile at once by default: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))


class Compilers:
    """A pool of processes that compile, with low priority and without a GPU. It is a context manager.

    Processes start when there are requests and end with the context. The parts of a tactic are compiled in parallel.
    If a process hangs, the tactic that it was compiling fails. If it dies, the tactic is compiled once more, in a new
    process while no other one compiles, and fails if that process dies too. If a process dies while idle, no tactic
    fails. On a CPU, or with a backend that does not compile ahead, requests do nothing.

    Args:
        backend: the backend. It is pickled, so its class must be defined in a module.
        capability: compute capability of the device to compile for; see `capability_of`.
        processes: the largest number of processes. By default the number of cores that this process may use.
        timeout_s: the seconds that one job may take. The process is then killed, and the tactic fails.
        child: makes a process as `Child` does, or takes a spare one.
    """

    def __init__(
        self,
        backend: Backend,
        capability: tuple[int, int] | None,
        processes: int | None = None,
        *,
        timeout_s: float = 120.0,
        child: Callable[..., Child] = Child,
    ) -> None:
        self._backend = backend
        self._capability = capability
        self._child = child
        self._most = processes or most_processes()
        self._reserve = self._most // RESERVE
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._reasons: dict[Hashable, str | None] = {}
        self._requested: set[Hashable] = set()
        self._awaited: set[Hashable] = set()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._alarm, self._ring = Pipe(duplex=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills all processes and drops the jobs that remain."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread:
            self._ring.send_bytes(b"closed")
            self._thread.join()
            self._thread = None
        self._alarm.close()
        self._ring.close()

    def request(self, layer: MoELayer, regime: Regime, rows: int, tactics: Iterable[Tactic]) -> None:
        """Queues the tactics of a bucket in their order and returns at once. Tactics queued before are skipped."""
        self._enqueue(self._jobs(layer, regime, rows, tactics))

    def wait(
        self, layer: MoELayer, regime: Regime, rows: int, tactics: Sequence[Tactic], likely_next: Sequence[Tactic] = ()
    ) -> dict[Tactic, str]:
        """Moves the tactics to the front of the queue and waits until they are compiled.

        Args:
            layer: the layer to compile for.
            regime: the deployment to compile for.
            rows: the row count of the bucket.
            tactics: what to wait for.
            likely_next: tactics that come next in the queue, before all others. They are not waited for.

        Returns:
            The tactics that do not compile, each with the reason.
        """
        jobs, then = (self._jobs(layer, regime, rows, some) for some in (tactics, likely_next))
        self._enqueue([*jobs, *then])
        keys = {job.key for job in jobs}
        places = {key: place for place, key in enumerate(dict.fromkeys(job.key for job in (*jobs, *then)))}
        with self._changed:
            self._queue = deque(sorted(self._queue, key=lambda job: places.get(job.key, len(places))))
            self._awaited |= keys
            if self._thread and not self._closed:
                self._ring.send_bytes(b"awaited")
            self._changed.wait_for(lambda: self._closed or self._failure or keys <= self._reasons.keys())
            if self._failure:
                raise self._failure
            failed: dict[Tactic, str] = {}
            for job in jobs:
                if (reason := self._reasons.get(job.key)) is not None:
                    failed.setdefault(job.tactic, reason)
        return failed

    def _jobs(self, layer: MoELayer, regime: Regime, rows: int, tactics: Iterable[Tactic]) -> list[_Job]:
        if self._capability is None:
            return []
        keys_of = self._backend.compile_keys
        return [
            _Job(key, layer, regime, rows, tactic, part, self._capability)
            for tactic in tactics
            for part, key in enumerate(keys_of(layer, regime, rows, tactic))
        ]

    def _enqueue(self, jobs: Sequence[_Job]) -> None:
        with self._changed:
            for job in jobs:
                if job.key not in self._requested:
                    self._requested.add(job.key)
                    self._queue.append(job)
            if self._closed or not self._queue:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moetune-compilers", daemon=True)
                self._thread.start()
        self._ring.send_bytes(b"queued")

    def _run(self) -> None:
        """Is the thread: assigns jobs to processes and receives their answers, until the pool is closed."""
        busy: dict[Any, _Busy] = {}
        idle: list[Child] = []
        try:
            while not self._closed:
                self._assign(busy, idle)
                deadline = min((each.deadline for each in busy.values()), default=None)
                left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                for ready in wait([self._alarm, *busy], left_s):
                    if ready is self._alarm:
                        self._alarm.recv_bytes()
                    else:
                        self._receive(ready, busy, idle)
                for connection in [c for c, each in busy.items() if each.deadline <= time.monotonic()]:
                    late = busy.pop(connection)
                    late.child.kill()
                    self._finish(late.job, f"hung: not compiled within {late.limit_s:g} s")
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            kill_all([*idle, *(each.child for each in busy.values())])

    def _assign(self, busy: dict[Any, _Busy], idle: list[Child]) -> None:
        while len(busy) < self._most and (job := self._next(busy.values())):
            if idle and not job.died:
                child, state = idle.pop(), _State.ASSIGNED
            else:
                if idle:
                    idle.pop().kill()  # it makes room for the new process
                child = self._child(_serve, self._backend, environment=NO_GPU, niceness=NICENESS)
                state = _State.STARTING
            busy[child.channel.connection] = _Busy(child, job, state, START_S)
            with suppress(OSError):  # if the process is dead, `_receive` finds that out
                child.channel.send(job)

    def _receive(self, ready: Any, busy: dict[Any, _Busy], idle: list[Child]) -> None:
        process = busy.pop(ready)
        try:
            answer = process.child.channel.receive()
            if not isinstance(answer, _Compiled | None):
                raise GarbledError(f"a {type(answer).__name__}, which is no answer to a job")
        except (EOFError, OSError):
            self._died(process, str(process.child.died()))
            return
        if answer is None:
            busy[ready] = _Busy(process.child, process.job, _State.COMPILING, self._timeout_s)
        else:
            idle.append(process.child)
            self._finish(process.job, answer.reason)

    def _died(self, process: _Busy, reason: str) -> None:
        """Puts the job of a dead process back to the front of the queue, or lets it fail; see `_State`."""
        job = process.job
        match process.state:
            case _State.COMPILING if job.died:
                self._finish(job, both(job.died, reason))
                return
            case _State.COMPILING:
                job = replace(job, died=reason)
            case _State.STARTING if job.starts + 1 >= STARTS:
                self._finish(job, reason)
                return
            case _State.STARTING:
                job = replace(job, starts=job.starts + 1)
        with self._changed:
            self._queue.appendleft(job)

    def _next(self, busy: Collection[_Busy]) -> _Job | None:
        """Returns the next job, or None if there is none to start now.

        A job that no caller waits for starts only while more processes than the reserve are free. A job during which a
        process died starts only while no other process has one, and no other job starts beside it.
        """
        with self._changed:
            if not self._queue or self._closed:
                return None
            if busy and (self._queue[0].died or any(each.job.died for each in busy)):
                return None
            awaited = self._queue[0].key in self._awaited
            return self._queue.popleft() if awaited or len(busy) < max(1, self._most - self._reserve) else None

    def _finish(self, job: _Job, reason: str | None) -> None:
        with self._changed:
            self._reasons[job.key] = reason
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Job:
    key: Hashable
    layer: MoELayer
    regime: Regime
    rows: int
    tactic: Tactic
    part: int
    capability: tuple[int, int]
    died: str = ""
    """How the process ended in which it was compiled before; empty if none did."""
    starts: int = 0
    """How many processes died before they acknowledged it."""


class _State(Enum):
    """The states of a process that has a job. Where the process dies, the state decides whether the job fails."""

    STARTING = auto()
    """The process is new and has not acknowledged its first job. The job goes back to the queue, `STARTS` − 1 times."""
    ASSIGNED = auto()
    """The process was idle and has not acknowledged the job. The job has not begun and goes back to the queue."""
    COMPILING = auto()
    """The process has acknowledged the job. The job is compiled once more; the second time it fails."""


@dataclass(frozen=True, slots=True)
class _Busy:
    """A process that has a job, and the seconds that it may stay in this state."""

    child: Child
    job: _Job
    state: _State
    limit_s: float
    since: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        return self.since + self.limit_s


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The answer to a job. `reason` says why it does not compile, or is None."""

    reason: str | None = None


def _serve(channel: Channel, backend: Backend) -> None:
    """Is a process of the pool: sends None to acknowledge a job, and a `_Compiled` when the job is done."""
    backend.load()
    while True:
        job: _Job = channel.receive()
        channel.send(None)
        try:
            backend.compile(job.layer, job.regime, job.rows, job.tactic, job.part, job.capability)
            done = _Compiled()
        except Exception as error:
            done = _Compiled(reason_of(error))
        channel.send(done)
