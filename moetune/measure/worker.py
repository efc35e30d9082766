"""`Worker`: the process that runs kernels and may die.

Kernels crash, hang, exhaust memory and corrupt the context that they run in. Each of these costs that tactic and a
new process; the process that asked goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from moetune.backends.base import Backend, Problem
from moetune.errors import DeviceLostError, MoetuneError, NoResultError
from moetune.measure.bench import Activity, Bench, BenchLike, Series
from moetune.measure.child import Channel, Child
from moetune.measure.reasons import reason_of, shortened
from moetune.spec.tactic import Tactic

GLANCE_S = 0.1
"""How often the parent looks at what the process is at."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds after which something hangs.

    `prepare_s`: the start of a process, the preparation of a problem, or a reference. `first_run_s`: a tactic's first
    run, its compilation included. `timing_s`: a batch of one tactic's runs, or a check; `run_s` more for each run.
    """

    prepare_s: float = 600.0
    first_run_s: float = 60.0
    timing_s: float = 30.0
    run_s: float = 1.0

    def limit_s(self, activity: Activity, runs: int = 1) -> float:
        """How long `runs` runs may take."""
        match activity:
            case Activity.FIRST_RUN:
                return self.first_run_s
            case Activity.TIMING | Activity.CHECK:
                return self.timing_s + runs * self.run_s
            case _:
                return self.prepare_s


class Worker:
    """One process that runs a backend's kernels on a device; a context manager. Nothing of it is left afterwards.

    Args:
        backend: the family of kernels; pickled, so a module must define its class.
        device: the torch device that the problems are for.
        timeouts: after which a tactic hangs.
    """

    def __init__(self, backend: Backend, device: str, *, timeouts: Timeouts | None = None) -> None:
        self._backend, self._device = backend, device
        self._timeouts = timeouts or Timeouts()
        self._child: Child | None = None
        self._prepared: WorkerBench | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process at once, whatever it is doing; the next question starts a new one."""
        child, self._child, self._prepared = self._child, None, None
        if child:
            child.kill()

    def bench(self, problem: Problem) -> WorkerBench:
        """`problem`, prepared in the process. The bench before it is forgotten there, and prepared anew when asked.

        Raises:
            MoetuneError: what the backend says against the problem.
            NoResultError: preparing it failed, or took the process down.
        """
        bench = WorkerBench(self, problem)
        self._ask(bench, None)
        return bench

    def _ask(self, bench: WorkerBench, request: _Request | None) -> Any:
        """The answer; None asks only for the preparation.

        Raises:
            _TacticLostError: a tactic took the process down; it is among the bench's failures.
            MoetuneError: something else failed.
        """
        fresh = self._child is None
        try:
            if self._prepared is not bench:
                self._prepared = None
                self._exchange(bench, bench.problem)
                self._prepared = bench
            return self._exchange(bench, request) if request else None
        except _ProcessLostError as lost:
            touch = lost.touch
            if touch.tactic is not None:
                bench.failures.setdefault(touch.tactic, shortened(f"{lost.how} during {touch.activity}"))
                raise _TacticLostError from None
            if touch.activity is Activity.IDLE and not fresh:  # it was killed from outside, between two questions
                return self._ask(bench, request)
            raise NoResultError(
                f"The worker process for {bench.problem.rows} rows of {bench.problem.layer.name} on {self._device} "
                f"failed during {touch.activity}: {lost.how}.",
                "No tactic is to blame: look for a lack of memory, a broken driver, a backend that cannot be imported.",
            ) from None

    def _exchange(self, bench: WorkerBench, request: object) -> Any:
        child = self._start()
        try:
            answer = self._answer(child, bench, request)
        except (EOFError, OSError):
            touch = child.channel.noted()
            how = str(child.died())
            self.close()
            raise _ProcessLostError(touch, how) from None
        except BaseException:
            self.close()  # whatever the process would still say answers no later question
            raise
        if isinstance(answer, MoetuneError):
            raise answer
        return answer

    def _answer(self, child: Child, bench: WorkerBench, request: object) -> Any:
        asked = time.monotonic()
        child.channel.send(request)
        while True:
            touch = child.channel.noted()
            limit_s = self._timeouts.limit_s(touch.activity, touch.runs)
            if child.channel.connection.poll(GLANCE_S):
                message = child.channel.receive()
                if isinstance(message, _Answer):
                    return message.value
                found = bench.eager if isinstance(message, _Eager) else bench.failures
                found[message.tactic] = message.reason
            elif time.monotonic() > max(touch.since, asked) + limit_s and touch == child.channel.noted():
                raise _ProcessLostError(touch, f"hung: nothing came of it within {limit_s:g} s")

    def _start(self) -> Child:
        if self._child is None:
            self._child = Child(_serve, self._backend, self._device, note=_Touch(Activity.PREPARE))
        return self._child


@contextmanager
def open_benches(backend: Backend, device: str, isolate: bool) -> Iterator[Callable[[Problem], BenchLike]]:
    """Yields a function that prepares a problem and returns its bench.

    Args:
        backend: the backend whose kernels the benches run.
        device: the torch device of the problems.
        isolate: True runs the kernels in a worker, which ends with the context; False runs them in this process.
    """
    if isolate:
        with Worker(backend, device) as worker:
            yield worker.bench
    else:
        yield lambda problem: Bench(backend, problem)


@dataclass(eq=False)
class WorkerBench:
    """A problem that a `Worker` has prepared; answers as `Bench` does.

    Attributes:
        failures: the tactics that did not run, ran wrong, or took the process down, each with the reason.
        eager: the tactics that were timed without a CUDA graph, each with the reason.
    """

    worker: Worker
    problem: Problem
    failures: dict[Tactic, str] = field(default_factory=dict)
    eager: dict[Tactic, str] = field(default_factory=dict)

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> Series:
        """See `Bench.samples`. Where a tactic takes the process down, the others are timed once more without it.

        Raises:
            NoResultError: the process fails, and no tactic is to blame.
        """
        while running := [tactic for tactic in tactics if tactic not in self.failures]:
            try:
                answer = self.worker._ask(self, _Request("samples", (running, list(draws))))
            except _TacticLostError:
                continue
            series = iter(answer)
            ran = set(running)
            return [next(series) if tactic in ran else None for tactic in tactics]
        return [None] * len(tactics)

    def check(self, tactic: Tactic, draw: int) -> bool:
        """See `Bench.check`.

        Raises:
            NoResultError: the process fails, and the tactic is not to blame.
        """
        if tactic in self.failures:
            return False
        try:
            return bool(self.worker._ask(self, _Request("check", (tactic, draw))))
        except _TacticLostError:
            return False


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    arguments: tuple[Any, ...]


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
class _Touch:
    """What the process has been at since a time of the system's monotonic clock."""

    activity: Activity
    tactic: Tactic | None = None
    runs: int = 1
    since: float = field(default_factory=time.monotonic)


class _ProcessLostError(Exception):
    def __init__(self, touch: _Touch, how: str) -> None:
        super().__init__(how)
        self.touch, self.how = touch, how


class _TacticLostError(Exception):
    """The process is lost, and the tactic to blame is among the failures."""


class _Reporter:
    """The process's `Watch`: a touch is only noted, so that the parent sleeps while time is taken."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def touch(self, activity: Activity, tactic: Tactic | None = None, runs: int = 1) -> None:
        self._channel.note(_Touch(activity, tactic, runs))

    def failed(self, tactic: Tactic, reason: str) -> None:
        self._channel.send(_Failed(tactic, reason))

    def eager(self, tactic: Tactic, reason: str) -> None:
        self._channel.send(_Eager(tactic, reason))


def _serve(channel: Channel, backend: Backend, device: str) -> None:
    """What the process does: prepares the problems that it is sent, and answers for the last one."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(torch.device(device).index or 0)
    reporter = _Reporter(channel)
    bench: Bench | None = None
    while True:
        reporter.touch(Activity.IDLE)
        request = channel.receive()
        try:
            if isinstance(request, _Request):
                answer = getattr(bench, request.method)(*request.arguments)
            else:
                bench = answer = None  # frees the memory of the problem before
                reporter.touch(Activity.PREPARE)
                bench = Bench(backend, request, watch=reporter)
        except DeviceLostError:
            return
        except MoetuneError as error:
            answer = error
        except Exception as error:
            answer = NoResultError(
                f"The problem cannot be prepared on {device}, or its reference not be computed: {reason_of(error)}.",
                "No tactic is to blame: look for a lack of memory, or an error in the backend.",
            )
        reporter.touch(Activity.IDLE)  # from here on no tactic is to blame
        channel.send(_Answer(answer))
