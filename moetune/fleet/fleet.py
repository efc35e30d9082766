"""`Fleet`: the workers of a cluster, and the questions that they can answer, each in its own environment."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moetune._version import __version__
from moetune.errors import UnsupportedError
from moetune.fleet.cluster import Cluster, Description
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.store import Store
from moetune.tuning.question import Question

if TYPE_CHECKING:
    from moetune.backends.base import Backend


class Fleet:
    """Starts the workers of a cluster. Those with another moetune are left out.

    Args:
        cluster: the cluster.
        backends: the backends of all questions. The workers are asked about equal ones once.

    Attributes:
        cluster: the cluster.
        workers: what each worker says of itself, by its number.
        left_out: why the other workers are not used.

    Raises:
        UnsupportedError: no worker can be used.
    """

    def __init__(self, cluster: Cluster, backends: Iterable[Backend]) -> None:
        self.cluster, self._backends = cluster, tuple(backends)
        pickled = [pickle.dumps(each) for each in self._backends]
        distinct = dict(zip(pickled, self._backends, strict=True))
        position = {each: index for index, each in enumerate(distinct)}
        self._index = {id(each): position[own] for each, own in zip(self._backends, pickled, strict=True)}
        described = cluster.describe(list(distinct.values()))
        refused = {number: why for number, each in described.items() if (why := self.refusal(each))}
        self.workers = {number: each for number, each in described.items() if number not in refused}
        self.left_out = tuple(dict.fromkeys(refused.values()))
        if not self.workers:
            raise UnsupportedError(self.left_out[0], "Install the same moetune on every machine of the cluster.")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the workers, in the order of their numbers."""
        return tuple(self.workers[number].name for number in sorted(self.workers))

    @property
    def has_gpu(self) -> bool:
        """Whether a worker has a GPU."""
        return any(worker.device == "cuda" for worker in self.workers.values())

    def refusal(self, worker: Description) -> str:
        """Returns why a worker is not used; empty if it is."""
        if worker.version == __version__:
            return ""
        return f"{worker.name} has moetune {worker.version}, and this process has {__version__}."

    def questions(self, layer: MoELayer, regime: Regime, backends: Sequence[Backend], store: Store) -> list[Question]:
        """Returns one question for each backend and each environment in which a worker can run it.

        Choices that were measured in different environments are never put into one profile: environments are part of
        the key under which a profile is stored.

        Args:
            layer: the layer.
            regime: the regime.
            backends: some of the objects that the fleet was made with.
            store: the store of the questions.

        Raises:
            UnsupportedError: no worker can run any of the backends.
        """
        found = [
            Question(layer, regime, backend, environment, store, device)
            for backend in backends
            for environment, device in self._environments(backend)
        ]
        if not found:
            reasons = {f"{each.name}: {self._environment(each, worker)}" for each in backends for worker in self._list}
            raise UnsupportedError(f"No worker can run this. Backend {'; '.join(sorted(reasons))}.")
        return found

    def can_answer(self, worker: Description, question: Question) -> bool:
        """Returns whether a worker measures in the environment of a question."""
        own = self._environment(question.backend, worker)
        return isinstance(own, Environment) and own.digest == question.environment.digest

    @property
    def _list(self) -> list[Description]:
        return [self.workers[number] for number in sorted(self.workers)]

    def _environment(self, backend: Backend, worker: Description) -> Environment | str:
        return worker.environments[self._index[id(backend)]]

    def _environments(self, backend: Backend) -> list[tuple[Environment, str]]:
        """Returns the environments of the workers that can run a backend, each once and with its device's kind."""
        alike: dict[str, list[tuple[Environment, str]]] = {}
        for worker in self._list:
            environment = self._environment(backend, worker)
            if isinstance(environment, Environment):
                alike.setdefault(environment.digest, []).append((environment, worker.device))
        return [(common([each for each, _ in group]), group[0][1]) for group in alike.values()]


def common(environments: Sequence[Environment]) -> Environment:
    """Returns the first of environments with equal strict fields, with the informative fields that all agree on.

    Several machines measure the choices of one profile, so it cannot name the host or the clocks of one of them.
    """
    first, *others = environments
    shared = {
        name: value
        for name, value in first.informative.items()
        if all(other.informative.get(name) == value for other in others)
    }
    return first.model_copy(update={"informative": shared})
