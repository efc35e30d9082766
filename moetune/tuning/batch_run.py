"""Answers the questions of a batch: in this process, or in one process for each of several GPUs."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from moetune.errors import MoetuneError
from moetune.measure.child import Channel, Child, kill_all
from moetune.measure.reasons import reason_of
from moetune.recordings.recording import Recording, remember
from moetune.store.profile import Profile
from moetune.tuning.events import BucketChosen, Event, Served, TacticMeasured

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.spec.layer import MoELayer
    from moetune.spec.regime import Regime
    from moetune.store.store import Store

VISIBLE = "CUDA_VISIBLE_DEVICES"
TRIES = 2
"""How often a question is asked whose process ends. Its second run goes on where the first one stopped."""


@dataclass(frozen=True, slots=True)
class Task:
    """A question of a batch by its number, and the store that gets the answer.

    `recording`: the recording that the regime replays; other processes have not read it.
    """

    number: int
    layer: MoELayer
    regime: Regime
    backend: Backend
    store: Store
    recording: Recording | None = None
    isolate: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a task: the profile and its file, how many buckets were measured, the time, or why it failed."""

    number: int
    seconds: float
    path: str = ""
    profile: Profile | None = None
    tuned: int = 0
    failed: str = ""


OnEvent = Callable[[int, Event], None]
"""Is called with the number of a question and an event of its tune."""
OnStart = Callable[[int, str], None]
"""Is called with the number of a question and the device that it is measured on."""
OnAnswer = Callable[[Answer], None]


def devices_for(requested: str | None) -> tuple[str, ...]:
    """Returns the devices of a batch: all GPUs that torch sees and that are like the first, or the CPU.

    Args:
        requested: `cpu`, `cuda` or `cuda:N` for this one alone, or None.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    from moetune.measure.probe import device_for

    if requested is not None or not torch.cuda.is_available():
        return (device_for(requested),)
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return tuple(f"cuda:{number}" for number, name in enumerate(names) if name == names[0])


def run(
    tasks: Sequence[Task],
    devices: Sequence[str],
    on_event: OnEvent,
    on_start: OnStart,
    on_answer: OnAnswer,
) -> None:
    """Answers all tasks, each on the device that is free first. A task that fails costs only itself.

    With one device everything runs in this process. With several, each has a process of its own that sees this device
    alone. All these processes end with this call, however it ends.

    Args:
        tasks: the tasks, which begin in this order.
        devices: the devices, such as `cuda:0`.
        on_event, on_start, on_answer: are called in this thread.
    """
    if len(devices) == 1:
        for task in tasks:
            on_start(task.number, devices[0])
            on_answer(_answer(task, devices[0], partial(on_event, task.number)))
        return
    pool = _Pool(tasks, devices[: len(tasks)], on_start)
    try:
        pool.work(on_event, on_answer)
    finally:
        kill_all(pool.children)


def _answer(task: Task, device: str, report: Callable[[Event], None]) -> Answer:
    """Returns the answer to a task. Only an interrupt ends it with an exception."""
    from moetune.tuning.tune import tune

    began = time.monotonic()
    served: Served | None = None
    tuned = 0

    def listen(event: Event) -> None:
        nonlocal served, tuned
        served = event if isinstance(event, Served) else served
        tuned += isinstance(event, BucketChosen)
        if not isinstance(event, TacticMeasured):
            report(event)

    try:
        profile = tune(
            task.layer, task.regime, task.backend, task.store, device=device, isolate=task.isolate, on_event=listen
        )
    except Exception as error:  # a package of kernels may raise anything
        reason = str(error) if isinstance(error, MoetuneError) else f"{reason_of(error)}."
        return Answer(task.number, time.monotonic() - began, tuned=tuned, failed=reason)
    question = profile.layer, profile.regime, profile.backend, profile.environment
    path = served.path if served else task.store.path(*question)
    return Answer(task.number, time.monotonic() - began, str(path), profile, tuned)


@dataclass(frozen=True, slots=True)
class _Reported:
    """An event of the tune of one question, as a process sends it."""

    number: int
    event: Event


@dataclass(slots=True)
class _Running:
    """The process of a device, and the task that it works on."""

    device: str
    child: Child
    task: Task | None = None


class _Pool:
    """Processes, one for each device, that take tasks from one queue."""

    def __init__(self, tasks: Sequence[Task], devices: Sequence[str], on_start: OnStart) -> None:
        self._waiting, self._on_start = deque(tasks), on_start
        self._tries: dict[int, int] = {}
        self._running = [_Running(device, _started(device)) for device in devices]

    @property
    def children(self) -> list[Child]:
        """All processes."""
        return [one.child for one in self._running]

    def work(self, on_event: OnEvent, on_answer: OnAnswer) -> None:
        """Hands out the tasks until all are answered."""
        for one in self._running:
            self._next(one)
        while busy := {one.child.channel.connection: one for one in self._running if one.task is not None}:
            for connection in wait(list(busy)):
                one = busy[connection]  # type: ignore[index]  # `wait` returns what it was given
                message = self._message(one)
                if isinstance(message, _Reported):
                    on_event(message.number, message.event)
                elif message is not None:
                    on_answer(message)
                    self._next(one)

    def _message(self, one: _Running) -> Answer | _Reported | None:
        """Returns the message of a process. If it has ended, its task is asked again, or has failed the second time."""
        assert one.task is not None
        try:
            message: Answer | _Reported = one.child.channel.receive()
            return message
        except (EOFError, OSError):
            how, task = str(one.child.died()), one.task
        one.child = _started(one.device)
        if self._tries[task.number] >= TRIES:
            return Answer(task.number, 0.0, failed=f"Its process ended {TRIES} times: {how}.")
        self._waiting.appendleft(task)
        self._next(one)
        return None

    def _next(self, one: _Running) -> None:
        one.task = self._waiting.popleft() if self._waiting else None
        if one.task is not None:
            number = one.task.number
            self._tries[number] = self._tries.get(number, 0) + 1
            self._on_start(number, one.device)
            try:
                one.child.channel.send(one.task)
            except OSError:  # it has just ended, which the next `receive` finds
                return


def _started(device: str) -> Child:
    kind, _, number = device.partition(":")
    return Child(_serve, kind, environment=_environment(number) if kind == "cuda" else {})


def _environment(number: str) -> Mapping[str, str]:
    """Returns the variable with which a process sees one GPU alone: number `number` of those that this one sees."""
    visible = [one.strip() for one in os.environ.get(VISIBLE, "").split(",") if one.strip()]
    return {VISIBLE: visible[int(number)] if visible else number}


def _serve(channel: Channel, device: str) -> None:
    """Answers the tasks that come through a channel, in a process of its own."""
    while True:
        task: Task = channel.receive()
        if task.recording is not None:
            remember(task.recording)
        channel.send(_answer(task, device, partial(_forward, channel, task.number)))


def _forward(channel: Channel, number: int, event: Event) -> None:
    channel.send(_Reported(number, event))
