"""`RayCluster`: the fleet workers as actors of a Ray cluster, one for each GPU."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from moetune.errors import UnsupportedError, UsageError
from moetune.fleet.cluster import Content, Description, Ended, Lost, Message, Order
from moetune.quoting import quoted, shortened
from moetune.tuning.uninterrupted import ENDING

if TYPE_CHECKING:
    from moetune.backends.base import Backend

LOCAL, AUTO = "local", "auto"
CLIENT = "ray://"
START_S = 120.0
"""How long workers may take to start. They import torch first."""
CONNECTING_S = 10.0
"""How long an address may take to answer. Ray itself would try for more than ten minutes."""
REPLACED = 3
"""How often the worker of one GPU is started. After that the GPU is left alone."""
OBJECT_STORE_BYTES = 80 << 20
"""The shared memory of a Ray that is started here, nearly the least that Ray accepts. Messages are small."""
THREADS_VARIABLE = "OMP_NUM_THREADS"


def undo_threads(started_with: Path = Path("/proc/self/environ")) -> None:
    """Removes `OMP_NUM_THREADS` from the environment, unless this process was started with it: then Ray has set it.

    The number of threads is part of a CPU's environment. A profile that a fleet has made must be found by a process
    that Ray has not started.

    Args:
        started_with: the file with the variables that the process was started with.
    """
    if started_with.exists() and f"\0{THREADS_VARIABLE}=".encode() not in b"\0" + started_with.read_bytes():
        os.environ.pop(THREADS_VARIABLE, None)


class RayWorker:
    """A `FleetWorker` as an actor. This module imports no torch, which would read the number of threads too early."""

    def __init__(self) -> None:
        undo_threads()
        from moetune.fleet.worker import FleetWorker

        self._worker = FleetWorker()

    def describe(self, backends: Sequence[Backend]) -> Description:
        """See `FleetWorker.describe`."""
        return self._worker.describe(backends)

    def tune(self, order: Order) -> Iterator[Content]:
        """See `FleetWorker.tune`."""
        yield from self._worker.tune(order)


@dataclass(slots=True)
class _Place:
    """A GPU, or a machine without one. `options`: Ray's, by which an actor gets it. `starts`: how many it has had."""

    options: Mapping[str, Any]
    starts: int = 0


@dataclass(frozen=True, slots=True)
class _Actor:
    handle: Any
    place: _Place


@dataclass(slots=True)
class _Pending:
    """What Ray is waited for: actors that start, and reports of orders; each with the number of its worker."""

    starting: dict[Any, int] = field(default_factory=dict)
    reports: dict[Any, int] = field(default_factory=dict)


class RayCluster:
    """The context in which a Ray cluster is used. At its end the workers are killed, and a Ray started here too.

    A worker that is lost is replaced if Ray finds a place for it. If no machine has a GPU, each has one worker.

    Args:
        address: `local` starts Ray on this machine; else the address of a running cluster, `auto` or `HOST:PORT`.
        local_gpus: with `local`: how many GPUs Ray takes for granted, instead of those that it finds.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        UnsupportedError: all its GPUs are in use.
    """

    def __init__(self, address: str, local_gpus: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--ray needs Ray, which is not installed.", "pip install 'ray>=2.50'") from None
        if address.startswith(CLIENT):
            raise UsageError(
                f"--ray {quoted(address)}: Ray's client does not stream results.",
                "Run this on a machine of the cluster with --ray auto, or give the address HOST:6379.",
            )
        self._ray, self._address = ray, address
        self._local = {"num_gpus": local_gpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        self._actors: dict[int, _Actor] = {}
        self._pending = _Pending()
        self._started = 0
        self._backends: Sequence[Backend] = ()

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray started here reports nothing to its makers
        local = self._local if self._address == LOCAL else {}
        if self._address not in (LOCAL, AUTO):
            _require_listening(self._address)
        with _handlers_kept():
            try:
                self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", **local)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UsageError(
                    f"--ray {quoted(self._address)}: there is no cluster to join: {shortened(str(error))}",
                    "Start one with `ray start --head`, or give --ray local. A cluster with a token needs "
                    "RAY_AUTH_MODE=token.",
                ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            with suppress(Exception):  # it may be gone with its machine
                self._ray.kill(actor.handle)
        with _handlers_kept():
            self._ray.shutdown()

    def describe(self, backends: Sequence[Backend]) -> Mapping[int, Description]:
        """See `Cluster.describe`."""
        self._backends = backends
        for place in self._places():
            self._start_actor(place)
        starting = self._pending.starting
        ready, _ = self._ray.wait(list(starting), num_returns=len(starting), timeout=START_S)
        found: dict[int, Description] = {}
        reasons: list[str] = []
        for message in map(self._started_one, ready):
            if isinstance(message.content, Description):
                found[message.worker] = message.content
            elif isinstance(message.content, Lost):
                reasons.append(message.content.reason)
        if not found:
            why = reasons[0] if reasons else f"none was ready after {START_S:g} s."
            raise UnsupportedError(
                f"No worker of the Ray cluster could be started: {why}",
                "Every machine of the cluster needs the same Python, Ray and moetune as this one.",
            )
        return found

    def start(self, worker: int, order: Order) -> None:
        """See `Cluster.start`."""
        reports = self._actors[worker].handle.tune.options(num_returns="streaming").remote(order)
        self._pending.reports[reports] = worker

    def receive(self) -> Message | None:
        """See `Cluster.receive`."""
        while pending := [*self._pending.reports, *self._pending.starting]:
            is_busy = bool(self._pending.reports)
            ready, _ = self._ray.wait(pending, num_returns=1, timeout=None if is_busy else START_S)
            if not ready:
                return None
            if ready[0] in self._pending.starting:
                return self._started_one(ready[0])
            return self._reported(ready[0])
        return None

    def _places(self) -> list[_Place]:
        """Returns a place for each GPU that is free, or for each machine if none has a GPU.

        Raises:
            UnsupportedError: all GPUs are in use.
        """
        ray = self._ray
        if gpus := int(ray.cluster_resources().get("GPU", 0)):
            if free := int(ray.available_resources().get("GPU", 0)):
                return [_Place({"num_gpus": 1, "num_cpus": 0}) for _ in range(free)]
            raise UnsupportedError(f"All {gpus} GPUs of the Ray cluster are in use.", "Wait until some are free.")
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return [
            _Place(
                {
                    "num_cpus": node["Resources"].get("CPU", 1),
                    "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                }
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def _start_actor(self, place: _Place) -> None:
        place.starts += 1
        self._started += 1
        handle = self._ray.remote(RayWorker).options(**place.options).remote()
        self._actors[self._started] = _Actor(handle, place)
        self._pending.starting[handle.describe.remote(self._backends)] = self._started

    def _started_one(self, described: Any) -> Message:
        """Returns what a worker that has started says of itself, or that it is lost."""
        worker = self._pending.starting.pop(described)
        try:
            return Message(worker, self._ray.get(described))
        except self._ray.exceptions.RayError as error:
            return self._lost(worker, error)

    def _reported(self, reports: Any) -> Message:
        """Returns the next report of an order, or that its worker is lost."""
        worker = self._pending.reports[reports]
        try:
            content = self._ray.get(next(reports))
        except self._ray.exceptions.RayError as error:
            del self._pending.reports[reports]
            return self._lost(worker, error)
        if isinstance(content, Ended):
            del self._pending.reports[reports]
        return Message(worker, content)

    def _lost(self, worker: int, error: Exception) -> Message:
        """Starts another worker in the place of a lost one, which is killed if only the connection to it is lost."""
        actor = self._actors.pop(worker)
        with suppress(Exception):  # it may be gone with its machine
            self._ray.kill(actor.handle)
        if actor.place.starts < REPLACED:
            self._start_actor(actor.place)
        return Message(worker, Lost(_reason(error)))


def _require_listening(address: str) -> None:
    """Checks that something answers at an address.

    Raises:
        UsageError: nothing does, or it is none.
    """
    host, _, port = address.rpartition(":")
    try:
        if not host or not port.isascii() or not port.isdecimal():
            raise OSError("it is not HOST:PORT")
        socket.create_connection((host, int(port)), timeout=CONNECTING_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"--ray {quoted(address)}: there is no cluster to join: {shortened(why)}.",
            "Give local, auto, or the address that `ray start --head` has printed, such as 10.0.0.1:6379.",
        ) from None


def _reason(error: Exception) -> str:
    """Returns one sentence of Ray's long text about an error."""
    text = str(error).strip()
    if "is unavailable" in text:
        return "its process or its machine does not answer."
    _, found, why = text.partition("The actor is dead because ")
    line = why.partition(".")[0] if found else text.splitlines()[-1] if text else type(error).__name__
    return f"{shortened(line.strip().rstrip('.'))}."


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restores the signal handlers that Ray replaces."""
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
