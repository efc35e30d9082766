"""`Worker` runs kernels in another process, because kernels can crash, hang, exhaust memory or break the CUDA context.

If a kernel does one of these, a new process is started. The calling process is not affected.

A process may also be killed from outside, for instance when memory runs out. So a tactic during which the process dies
is tried once more, alone in a new process, and fails only if it ends that one too. A tactic that hangs fails at once,
unless its time was bounded by what the best tactic so far needs: then it too is tried once more.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from moetune.backends.base import Backend, Problem
from moetune.errors import DeviceLostError, MoetuneError, NoResultError
from moetune.measure.bench import Activity, Bench, BenchLike, Series
from moetune.measure.child import Channel, Child, GarbledError
from moetune.measure.reasons import both, reason_of, shortened
from moetune.measure.timeouts import Timeouts, how_it_hung
from moetune.spec.tactic import Tactic

OpenBenches = Callable[[Backend, str, bool], AbstractContextManager[Callable[[Problem], BenchLike]]]
"""The type of `open_benches`."""
GLANCE_S = 0.1
"""The interval at which the parent reads the status of the process."""
RETRIES = 3
"""How often one request is sent again, to a new process, after deaths of the process that no tactic caused.

It is also how often a tactic that runs alone, but ends the process beside others, is timed beside others again.
"""


class Worker:
    """A process that runs a backend's kernels on a device. It is a context manager; the process ends with the context.

    Args:
        backend: the backend. It is pickled, so its class must be defined in a module.
        device: the torch device of the problems.
        timeouts: how long each activity may take.
        now_s: returns the current time in s on the system's monotonic clock. Tests replace it.
        child: makes the process as `Child` does, or takes a spare one.
    """

    def __init__(
        self,
        backend: Backend,
        device: str,
        *,
        timeouts: Timeouts | None = None,
        now_s: Callable[[], float] = time.monotonic,
        child: Callable[..., Child] = Child,
    ) -> None:
        self._backend, self._device, self._child_of = backend, device, child
        self._timeouts = timeouts or Timeouts()
        self._now_s = now_s
        self._child: Child | None = None
        self._prepared: WorkerBench | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the process at once. The next request starts a new one."""
        child, self._child, self._prepared = self._child, None, None
        if child:
            child.kill()

    def bench(self, problem: Problem) -> WorkerBench:
        """Prepares `problem` in the process and returns its bench.

        The process holds one problem at a time. An earlier bench still works: its next request prepares its problem
        again.

        Raises:
            MoetuneError: the backend refuses the problem.
            NoResultError: the preparation failed, or processes ended during it again and again.
        """
        bench = WorkerBench(self, problem)
        self._request(bench, None)
        return bench

    def _request(self, bench: WorkerBench, request: _Request | None) -> Any:
        """Sends a request to the process and returns the answer. None only prepares the bench's problem.

        Raises:
            _TacticLostError: the process ended or hangs, and a tactic ran. The bench has noted that.
            MoetuneError: something else failed.
        """
        deaths = 0
        while True:
            try:
                if self._prepared is not bench:
                    self._prepared = None
                    self._exchange(bench, bench.problem)
                    self._prepared = bench
                return self._exchange(bench, request) if request else None
            except _ProcessLostError as lost:
                status = lost.status
                if lost.garbled and request:
                    bench._garbled(request.tactics, lost.how)
                    raise _TacticLostError from None
                if status.tactic is not None:
                    bench._ended(status.tactic, f"{lost.how} during {status.activity}", lost.hung)
                    raise _TacticLostError from None
                deaths += 1
                if lost.hung or deaths > RETRIES:
                    again = "" if lost.hung else f", {deaths} times in a row"
                    raise NoResultError(
                        f"The worker process for {bench.problem.rows} rows of {bench.problem.layer.name} on "
                        f"{self._device} failed during {status.activity}{again}: {lost.how}.",
                        "No tactic caused this. Check the free memory, the driver, and that the backend can be "
                        "imported.",
                    ) from None

    def _exchange(self, bench: WorkerBench, request: object) -> Any:
        child = self._start()
        try:
            answer = self._answer(child, bench, request)
        except (EOFError, OSError) as error:
            status = child.channel.noted()
            how = str(child.died())
            self.close()
            garbled = isinstance(error, OSError) and not isinstance(error, ConnectionError)
            raise _ProcessLostError(status, how, garbled=garbled) from None
        except BaseException:
            self.close()  # or the answer to this request would be taken for the answer to the next
            raise
        if isinstance(answer, MoetuneError):
            raise answer
        return answer

    def _answer(self, child: Child, bench: WorkerBench, request: object) -> Any:
        sent = self._now_s()
        child.channel.send(request)
        while True:
            status = child.channel.noted()
            limit_us = request.limit_us if isinstance(request, _Request) else math.inf
            limit_s = self._timeouts.limit_s(status.activity, status.runs, limit_us)
            if child.channel.connection.poll(GLANCE_S):
                message = child.channel.receive()
                if isinstance(message, _Answer):
                    return message.value
                if not isinstance(message, _Failed | _Eager):
                    raise GarbledError(f"a {type(message).__name__}, which is no message of a worker")
                reasons = bench.eager if isinstance(message, _Eager) else bench.failures
                reasons[message.tactic] = message.reason
            elif self._now_s() > max(status.since, sent) + limit_s and status == child.channel.noted():
                learned = limit_s < self._timeouts.limit_s(status.activity, status.runs)
                raise _ProcessLostError(status, how_it_hung(status.runs, limit_s, learned), hung=not learned)
            elif child.has_ended and not child.channel.connection.poll():  # a process that it left holds the other end
                raise EOFError

    def _start(self) -> Child:
        if self._child is None:
            self._child = self._child_of(_serve, self._backend, self._device, note=_Status(Activity.PREPARE))
        return self._child


@contextmanager
def open_benches(
    backend: Backend, device: str, isolate: bool, child: Callable[..., Child] = Child
) -> Iterator[Callable[[Problem], BenchLike]]:
    """Yields a function that prepares a problem and returns its bench.

    Args:
        backend: the backend whose kernels the benches run.
        device: the torch device of the problems.
        isolate: True runs the kernels in a worker, which ends with the context; False runs them in this process.
        child: as for `Worker`.
    """
    if isolate:
        with Worker(backend, device, child=child) as worker:
            yield worker.bench
    else:
        have_run: set[Tactic] = set()
        yield lambda problem: Bench(backend, problem, have_run=have_run)


@dataclass(eq=False)
class WorkerBench:
    """The bench of a problem that a `Worker` has prepared. It does what `Bench` does.

    Attributes:
        worker: the worker.
        problem: the problem.
        failures: the tactics that did not run, gave a wrong result, or ended the process, each with the reason.
        eager: the tactics that were timed without a CUDA graph, each with the reason.
    """

    worker: Worker
    problem: Problem
    failures: dict[Tactic, str] = field(default_factory=dict)
    eager: dict[Tactic, str] = field(default_factory=dict)
    _suspects: dict[Tactic, str | None] = field(default_factory=dict)
    """The tactics that are tried alone next: the process died during them once, with the reason, or may have."""

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int], limit_us: float = math.inf) -> Series:
        """Times tactics; see `Bench.samples`.

        If the process dies while a tactic runs, the tactic is timed alone in a new process. If it ends that one too, it
        fails. Then the tactics that have not failed are timed again.

        Raises:
            NoResultError: processes failed again and again, but not in a tactic.
        """
        ran_alone: Counter[Tactic] = Counter()
        while running := [tactic for tactic in tactics if tactic not in self.failures]:
            alone = next((tactic for tactic in running if tactic in self._suspects), None)
            try:
                if alone is None:
                    answer = self.worker._request(self, _Request("samples", (running, list(draws), limit_us)))
                    break
                self.worker._request(self, _Request("samples", ([alone], list(draws), limit_us)))
            except _TacticLostError:
                continue
            ran_alone[alone] += 1
            reason = self._suspects.pop(alone)
            if reason and ran_alone[alone] > RETRIES and alone not in self.failures:
                self.failures[alone] = shortened(f"{reason} beside others, {ran_alone[alone]} times")
        else:
            return [None] * len(tactics)
        series = iter(answer)
        ran = set(running)
        return [next(series) if tactic in ran else None for tactic in tactics]

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Checks a tactic's output; see `Bench.check`. If the process dies during the check, it is done once more.

        Raises:
            NoResultError: processes failed again and again, but not in the tactic.
        """
        while tactic not in self.failures:
            try:
                right = bool(self.worker._request(self, _Request("check", (tactic, draw))))
            except _TacticLostError:
                continue
            self._suspects.pop(tactic, None)
            return right
        return False

    def _garbled(self, tactics: Sequence[Tactic], reason: str) -> None:
        """Notes that one of `tactics` has garbled the connection. The process may have gone on to others since."""
        if len(tactics) == 1:
            self._ended(tactics[0], reason, hung=False)
        else:
            for tactic in tactics:
                if tactic not in self.failures:
                    self._suspects.setdefault(tactic, None)

    def _ended(self, tactic: Tactic, reason: str, hung: bool) -> None:
        """Notes that the process died or hung while `tactic` ran. It fails if it hung, or if this is the second time.

        A tactic that the process has already reported as failed keeps that reason.
        """
        first = self._suspects.pop(tactic, None)
        if tactic in self.failures:
            return
        if hung or first is not None:
            self.failures[tactic] = shortened(reason) if first is None else both(first, reason)
        else:
            self._suspects[tactic] = reason


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    arguments: tuple[Any, ...]

    @property
    def tactics(self) -> Sequence[Tactic]:
        """The tactics that run."""
        first = self.arguments[0]
        return (first,) if isinstance(first, Tactic) else tuple(dict.fromkeys(first))

    @property
    def limit_us(self) -> float:
        """How long one run of a tactic may take in µs."""
        return float(self.arguments[2]) if self.method == "samples" else math.inf


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any


@dataclass(frozen=True, slots=True)
class _Failed:
    tactic: Tactic
    reason: str


@dataclass(frozen=True, slots=True)
class _Eager:
    tactic: Tactic
    reason: str


@dataclass(frozen=True, slots=True)
class _Status:
    """What the process is doing, and since when on the system's monotonic clock in s."""

    activity: Activity
    tactic: Tactic | None = None
    runs: int = 1
    since: float = field(default_factory=time.monotonic)


class _ProcessLostError(Exception):
    """The process has ended or hangs.

    Args:
        status: what it was doing.
        how: how it ended.
        hung: whether it hangs; else it has ended.
        garbled: whether something else than a message came from it.
    """

    def __init__(self, status: _Status, how: str, *, hung: bool = False, garbled: bool = False) -> None:
        super().__init__(how)
        self.status, self.how, self.hung, self.garbled = status, how, hung, garbled


class _TacticLostError(Exception):
    """The process ended or hangs, and a tactic ran. The bench has noted that."""


class _Reporter:
    """The `Observer` in the process. It only writes the status as a note, so that the parent sleeps during a timing."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def starts(self, activity: Activity, tactic: Tactic | None = None, runs: int = 1) -> None:
        try:
            self._channel.require_open()
            self._channel.note(_Status(activity, tactic, runs))
        except OSError as error:  # the last note names the tactic that did it
            print(error, file=sys.stderr, flush=True)
            os._exit(1)

    def failed(self, tactic: Tactic, reason: str) -> None:
        self._channel.send(_Failed(tactic, reason))

    def eager(self, tactic: Tactic, reason: str) -> None:
        self._channel.send(_Eager(tactic, reason))


def is_moetunes(error: Exception) -> bool:
    """Returns whether an error is one of moetune's own. The parent may not be able to load another class."""
    return type(error).__module__ == MoetuneError.__module__


def _serve(channel: Channel, backend: Backend, device: str) -> None:
    """Is the process: prepares each problem that it receives, and answers requests about the last one."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(torch.device(device).index or 0)
    backend.load()
    reporter = _Reporter(channel)
    have_run: set[Tactic] = set()
    bench: Bench | None = None
    while True:
        reporter.starts(Activity.IDLE)
        request = channel.receive()
        try:
            if isinstance(request, _Request):
                answer = getattr(bench, request.method)(*request.arguments)
            else:
                bench = answer = None  # frees the memory of the previous problem
                reporter.starts(Activity.PREPARE)
                bench = Bench(backend, request, observer=reporter, have_run=have_run)
        except DeviceLostError:
            return
        except Exception as error:
            answer = (
                error
                if is_moetunes(error)
                else NoResultError(
                    f"A problem could not be prepared on {device}, or its reference not computed: {reason_of(error)}.",
                    "No tactic caused this. Check the free memory and whether the backend has a bug.",
                )
            )
        reporter.starts(Activity.IDLE)  # the tactic is done, so it cannot cause what happens next
        channel.send(_Answer(answer))
