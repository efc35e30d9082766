"""Defines `JoinedBackend`, which runs the tactics of several backends, so that one process can time them in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Candidates, Problem, Runner
from moetune.errors import NoResultError, UnsupportedError
from moetune.measure.reasons import reason_of
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch

BACKEND = "backend"
"""The name in a joined tactic whose value is the backend's name."""


def joined(backend: str, tactic: Tactic) -> Tactic:
    """Returns a backend's tactic as a tactic of the joined backend."""
    return Tactic({BACKEND: backend, **tactic})


def backend_of(tactic: Tactic) -> str:
    """Returns the name of the backend that a joined tactic belongs to."""
    return str(tactic[BACKEND])


class JoinedBackend(Backend):
    """Runs the tactics of all `backends`. Each backend keeps weights and inputs of its own on the device.

    Args:
        backends: have different names and all compute the layer. The default is the first one's.
    """

    name = "joined"

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self.modules = tuple(module for backend in backends for module in backend.modules)

    def unavailable(self) -> tuple[str, str] | None:
        """Returns the first obstacle of any backend."""
        return next(filter(None, (backend.unavailable() for backend in self._backends.values())), None)

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns the first reason of any backend."""
        return next(filter(None, (backend.unsupported(layer, regime) for backend in self._backends.values())), None)

    def environment(self) -> dict[str, str]:
        """Returns the fields of all backends."""
        return {name: value for backend in self._backends.values() for name, value in backend.environment().items()}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns the candidates of all backends."""
        found = {name: backend.candidates(layer, regime, rows, device) for name, backend in self._backends.items()}
        return Candidates(
            tuple(joined(name, tactic) for name, of_one in found.items() for tactic in of_one.tactics),
            {joined(name, tactic): why for name, of_one in found.items() for tactic, why in of_one.excluded.items()},
        )

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the default of the first backend."""
        name, backend = next(iter(self._backends.items()))
        return joined(name, backend.default(layer, regime, rows))

    def tolerance(self, layer: MoELayer) -> float:
        """Returns the smallest tolerance of all backends."""
        return min(backend.tolerance(layer) for backend in self._backends.values())

    def prepare(self, problem: Problem) -> JoinedRunner:
        """Prepares every backend. If one cannot be prepared, only its own tactics fail, when they are run."""
        runners: dict[str, Runner] = {}
        failed: dict[str, Exception] = {}
        for name, backend in self._backends.items():
            try:
                runners[name] = backend.prepare(problem)
            except Exception as error:  # a package of kernels may raise anything
                failed[name] = error
        return JoinedRunner(runners, failed)


class JoinedRunner:
    """Runs each tactic by the runner of its backend."""

    def __init__(self, runners: dict[str, Runner], failed: dict[str, Exception]) -> None:
        self._runners, self._failed = runners, failed

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """See `Runner.run`."""
        name = backend_of(tactic)
        if name in self._failed:
            error = self._failed[name]
            raise NoResultError(f"cannot be prepared: {reason_of(error)}")
        return self._runners[name].run(Tactic({key: value for key, value in tactic.items() if key != BACKEND}), draw)

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Raises an error, because the backends have different weights and so share no reference.

        Raises:
            UnsupportedError: always; tactics are checked where they are tuned.
        """
        raise UnsupportedError("Each backend has weights of its own, so there is no shared reference.")
