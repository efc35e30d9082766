"""Defines what a cluster of fleet workers does, and the messages between it and the process that holds the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile
from moetune.tuning.events import Event

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.recordings.recording import Recording


@dataclass(frozen=True, slots=True)
class Description:
    """What a fleet worker says of itself.

    `name`: its machine and GPU, for people. `pid`: its process there. `device`: `cuda` or `cpu`. `version`: that of its
    moetune. `environments`: for each backend that it was asked about the environment of measurements, or why it cannot
    run there.
    """

    name: str
    pid: int
    device: str
    version: str
    environments: tuple[Environment | str, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """What a fleet worker is to tune: the buckets `rows` of a question.

    `environment`: the digest of the environment that the choices are stored under. `known`: the choices of other
    buckets, whose fast tactics begin the searches. `adds`: also tune the buckets that the ladder `adaptive` adds.
    `recording`: the recording that the regime replays. `isolate`: run kernels in a process of their own.
    """

    layer: MoELayer
    regime: Regime
    backend: Backend
    environment: str
    rows: tuple[int, ...]
    known: Profile
    adds: bool
    recording: Recording | None
    isolate: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The last message about an order. `failed`: why some of its buckets have no choice; empty if all have."""

    failed: str = ""


@dataclass(frozen=True, slots=True)
class Lost:
    """The process or the machine of a worker has ended, for this reason."""

    reason: str


Content = Choice | Event | Ended
"""What a worker reports of an order: the choice of each bucket once it is made, events, and at last `Ended`."""


@dataclass(frozen=True, slots=True)
class Message:
    """What worker number `worker` reports. A `Description` comes first, from one that has just started."""

    worker: int
    content: Content | Description | Lost


class Cluster(Protocol):
    """The fleet workers, each a process that has one GPU."""

    def describe(self, backends: Sequence[Backend]) -> Mapping[int, Description]:
        """Starts the workers, and returns what each says of itself and these backends, by its number.

        Raises:
            MoetuneError: no worker could be started.
        """

    def start(self, worker: int, order: Order) -> None:
        """Hands a free worker an order."""

    def receive(self) -> Message | None:
        """Waits for the next message. Returns None if none can come, because no worker is busy or starting."""
