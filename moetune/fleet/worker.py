"""`FleetWorker`: what runs on each GPU of a cluster. It writes no store; the process that started it does."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from moetune._version import __version__
from moetune.backends.base import Backend
from moetune.errors import MoetuneError, UnsupportedError
from moetune.fleet.cluster import Content, Description, Ended, Order
from moetune.measure.probe import device_for, environment
from moetune.measure.reasons import reason_of
from moetune.recordings.recording import remember
from moetune.spec.environment import Environment
from moetune.store.store import Store
from moetune.tuning.batch_run import VISIBLE
from moetune.tuning.events import BucketFailed, Event, NoisyBucket
from moetune.tuning.question import Question
from moetune.tuning.run import TuneRun
from moetune.tuning.saving import Notes


class FleetWorker:
    """Tunes what it is handed, on the one GPU that its process sees, or on the CPU."""

    def describe(self, backends: Sequence[Backend]) -> Description:
        """Returns what the worker is, and for each backend the environment of its measurements."""
        device = device_for(None)
        visible = f" GPU {os.environ.get(VISIBLE, '0')}" if device == "cuda" else ""
        found = tuple(_environment(backend, device) for backend in backends)
        return Description(f"{platform.node()}{visible}", os.getpid(), device, __version__, found)

    def tune(self, order: Order) -> Iterator[Content]:
        """Yields the choice of each bucket once it is made, events before the choices that follow them, and `Ended`."""
        events: list[Event] = []
        failed = ""
        with TemporaryDirectory(prefix="moetune-") as folder:
            try:
                for chosen in _run(order, Path(folder), events).choices():
                    yield from _taken(events)
                    yield chosen.choice
            except Exception as error:  # a package of kernels may raise anything
                failed = str(error) if isinstance(error, MoetuneError) else f"{reason_of(error)}."
        yield from _taken(events)
        yield Ended(failed)


def _environment(backend: Backend, device: str) -> Environment | str:
    """Returns the environment of a backend's measurements here, or why the backend cannot run."""
    try:
        if (obstacle := backend.unavailable()) is not None:
            return obstacle[0]
        return environment(backend, device)
    except MoetuneError as error:
        return error.message
    except (ImportError, OSError) as error:  # OSError: a package cannot load a system library
        return f"{reason_of(error)}"


def _run(order: Order, folder: Path, events: list[Event]) -> TuneRun:
    """Returns the tune of an order, whose journal is in a folder of its own."""
    if order.recording is not None:
        remember(order.recording)
    device = device_for(None)
    store = Store(folder, packaged=folder)
    question = Question(order.layer, order.regime, order.backend, environment(order.backend, device), store, device)
    if question.environment.digest != order.environment:
        raise UnsupportedError(
            "This worker's environment is not the one that the choices are stored under.", "Run the same command again."
        )
    question.require_support()

    def listen(event: Event) -> None:
        if isinstance(event, BucketFailed | NoisyBucket):
            events.append(event)

    return TuneRun(
        question, order.rows, order.known, None, Notes(question.journal(), lambda event: None), listen,
        strategy="auto", isolate=order.isolate, time_budget_s=None, adds=order.adds,
    )  # fmt: skip


def _taken(events: list[Event]) -> Iterator[Event]:
    while events:
        yield events.pop(0)
