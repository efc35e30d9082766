"""`Spares`: processes that import a backend's modules before it is known what they will run."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from typing import Self

from moetune.backends.base import Backend
from moetune.measure.child import Channel, Child, kill_all
from moetune.measure.compiling import NICENESS, NO_GPU, RESERVE, most_processes

Kind = tuple[Mapping[str, str], int]
"""The environment variables and the niceness of a process."""


class Spares:
    """Starts processes ahead, so that their imports take place while this process does something else.

    It is a context manager; processes that nobody has taken end with it.
    """

    def __init__(self) -> None:
        self._spares: list[tuple[Kind, Child]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        kill_all([spare for _, spare in self._spares])
        self._spares.clear()

    def __len__(self) -> int:
        return len(self._spares)

    def start_for(self, backend: Backend, device: str | None, isolate: bool) -> None:
        """Starts what a tune needs, unless that has been started: a worker, and for a GPU processes that compile.

        Args:
            backend: the backend that is tuned.
            device: its torch device, or None if that is not known yet. torch is not asked, because it takes seconds to
                import.
            isolate: whether there is a worker.
        """
        if self._spares:
            return
        if isolate:
            self.start(1, backend)
        if backend.compiles and (has_gpu() if device is None else device.startswith("cuda")):
            count = most_processes() - most_processes() // RESERVE
            self.start(count, backend, environment=NO_GPU, niceness=NICENESS)

    def start(self, count: int, backend: Backend, *, environment: Mapping[str, str] = {}, niceness: int = 0) -> None:
        """Starts processes and returns at once.

        Args:
            count: how many.
            backend: the backend whose modules they import.
            environment: as for `Child`.
            niceness: as for `Child`.
        """
        for _ in range(count):
            child = Child(_wait, backend, environment=environment, niceness=niceness)
            self._spares.append(((environment, niceness), child))

    def child(
        self,
        serve: Callable[..., None],
        *arguments: object,
        note: object = None,
        environment: Mapping[str, str] = {},
        niceness: int = 0,
    ) -> Child:
        """Returns a process as `Child` makes it: a spare one of this environment and niceness, or else a new one."""
        for spare in [spare for spare in self._spares if spare[0] == (environment, niceness)]:
            self._spares.remove(spare)
            if not spare[1].has_ended:
                spare[1].give(serve, *arguments, note=note)
                return spare[1]
            spare[1].kill()
        return Child(serve, *arguments, note=note, environment=environment, niceness=niceness)


def has_gpu() -> bool:
    """Returns whether this machine seems to have an NVIDIA GPU: a guess that needs no library."""
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def _wait(channel: Channel, backend: Backend) -> None:
    """Is a spare process: imports the backend's modules, and then runs what it is given."""
    backend.load()
    serve, arguments = channel.receive()
    serve(channel, *arguments)
