"""A cluster without Ray, whose workers measure nothing and are lost or fail in planted ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from choices import make_choice
from planted import LAYER, PlantedBackend

from moetune import __version__
from moetune.fleet.cluster import Content, Description, Ended, Lost, Message, Order
from moetune.fleet.fleet import Fleet
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store
from moetune.tuning.batch_run import Answer
from moetune.tuning.events import BucketFailed
from moetune.tuning.question import Question
from moetune.tuning.refine import further_bucket

BACKEND = PlantedBackend({"default": 1.0, "fast": 0.5})
H100 = Environment(device="H100", strict={"torch": "1"}, informative={"host": "a", "os": "linux"})
H200 = Environment(device="H200", strict={"torch": "1"})
CROSSOVER = 1000
"""The fastest tactic changes at this number of rows."""


def planted_choice(rows: int) -> Choice:
    """The choice of a bucket, whichever worker makes it."""
    return make_choice(rows, tactic={"tile": 64 if rows < CROSSOVER else 128})


@dataclass
class PlantedCluster:
    """Workers, numbered from 1, in the given environments.

    `lost_after`: after how many reports of its own a worker is lost. `failing`: the buckets whose default fails, by
    worker. `replaced`: how many lost workers are replaced, by one in the same environment. `pick`: which of the busy
    workers reports next. `versions`: other versions of moetune, by worker.
    """

    environments: Sequence[Environment | str]
    lost_after: Mapping[int, int] = field(default_factory=dict)
    failing: Mapping[int, Sequence[int]] = field(default_factory=dict)
    replaced: int = 0
    pick: Callable[[list[int]], int] = min
    versions: Mapping[int, str] = field(default_factory=dict)
    orders: list[tuple[int, Order]] = field(default_factory=list)
    delivered: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._own = dict(enumerate(self.environments, 1))
        self._left = {worker: self.lost_after.get(worker, 10**6) for worker in self._own}
        self._reports: dict[int, tuple[Order, Iterator[Content]]] = {}
        self._joining: list[int] = []

    def description(self, worker: int) -> Description:
        version = self.versions.get(worker, __version__)
        own = self._own[worker]
        device = "cpu" if isinstance(own, str) else "cuda"
        return Description(f"worker {worker}", worker, device, version, (own,) * self.count)

    def describe(self, backends: Sequence[object]) -> Mapping[int, Description]:
        self.count = len(backends)
        return {worker: self.description(worker) for worker in self._own}

    def start(self, worker: int, order: Order) -> None:
        own = self._own[worker]
        assert isinstance(own, Environment)
        assert order.environment == own.digest, "measured in another environment than it is stored under"
        assert worker not in self._reports
        self.orders.append((worker, order))
        self._reports[worker] = order, self._contents(worker, order)

    def receive(self) -> Message | None:
        if self._joining:
            return Message(worker := self._joining.pop(), self.description(worker))
        if not self._reports:
            return None
        worker = self.pick(sorted(self._reports))
        order, contents = self._reports[worker]
        if not self._left[worker]:
            return self._lost(worker)
        self._left[worker] -= 1
        content = next(contents)
        if isinstance(content, Ended):
            del self._reports[worker]
        if isinstance(content, Choice):
            self.delivered.append((order.regime.digest + order.environment, content.rows))
        return Message(worker, content)

    def _lost(self, worker: int) -> Message:
        del self._reports[worker]
        own = self._own.pop(worker)
        if self.replaced:
            self.replaced -= 1
            new = max([worker, *self._left]) + 1
            self._own[new], self._left[new] = own, self.lost_after.get(new, 10**6)
            self._joining.append(new)
        return Message(worker, Lost("its machine has gone."))

    def _contents(self, worker: int, order: Order) -> Iterator[Content]:
        failed = ""
        made = {choice.rows: choice for choice in order.known.choices}
        for rows in order.rows:
            if rows in self.failing.get(worker, ()):
                yield BucketFailed(rows, "planted")
                failed = f"The default failed at {rows} rows."
            else:
                yield made.setdefault(rows, planted_choice(rows))
        while order.adds and not failed and (rows := further_bucket([made[each] for each in sorted(made)])):
            yield made.setdefault(rows, planted_choice(rows))
        yield Ended(failed)


@dataclass
class Told:
    """What a run reports."""

    answers: dict[int, Answer] = field(default_factory=dict)
    starts: list[tuple[int, str]] = field(default_factory=list)
    events: list[tuple[int, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def answer(self, answer: Answer) -> None:
        assert answer.number not in self.answers
        self.answers[answer.number] = answer

    @property
    def listeners(self) -> tuple[Callable[..., None], ...]:
        return (
            lambda number, event: self.events.append((number, event)),
            lambda number, where: self.starts.append((number, where)),
            self.answer,
            self.notes.append,
        )


def regime(ladder: str, seed: int = 0) -> Regime:
    return Regime(ep_size=2, attention_dp=True, dispatch="allgather", ladder=ladder, draws=1, seed=seed)


def questions_of(fleet: Fleet, folder: Path, *ladders: str) -> dict[int, Question]:
    """The questions of regimes with these ladders, each with a seed of its own, in every environment of a fleet."""
    store = Store(folder, packaged=folder / "none")
    found: list[Question] = []
    for seed, ladder in enumerate(ladders):
        found += fleet.questions(LAYER, regime(ladder, seed), [BACKEND], store)
    return dict(enumerate(found, 1))


def stored(question: Question) -> Profile:
    return question.load()
