"""`JoinedBackend`: several families of kernels as one, so that a final can be played among them in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Candidates, Problem, Runner
from moetune.errors import NoResultError, UnsupportedError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch

FAMILY = "backend"
"""The name in a joined tactic that says whose it is."""


def joined(backend: str, tactic: Tactic) -> Tactic:
    """A family's tactic as one of the joined backend's."""
    return Tactic({FAMILY: backend, **tactic})


def family(tactic: Tactic) -> str:
    """Whose a joined tactic is."""
    return str(tactic[FAMILY])


class JoinedBackend:
    """The tactics of all of `backends`; each family keeps weights and inputs of its own on the device.

    Args:
        backends: with different names; all compute the layer. The default is the first one's.
    """

    name = "joined"

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = {backend.name: backend for backend in backends}

    def unavailable(self) -> tuple[str, str] | None:
        """The first obstacle of any family."""
        return next(filter(None, (backend.unavailable() for backend in self._backends.values())), None)

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """The first reason of any family."""
        return next(filter(None, (backend.unsupported(layer, regime) for backend in self._backends.values())), None)

    def environment(self) -> dict[str, str]:
        """All families' fields."""
        return {name: value for backend in self._backends.values() for name, value in backend.environment().items()}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """All families' candidates."""
        found = {name: backend.candidates(layer, regime, rows, device) for name, backend in self._backends.items()}
        return Candidates(
            tuple(joined(name, tactic) for name, of_one in found.items() for tactic in of_one.tactics),
            {joined(name, tactic): why for name, of_one in found.items() for tactic, why in of_one.excluded.items()},
        )

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """The first family's."""
        name, backend = next(iter(self._backends.items()))
        return joined(name, backend.default(layer, regime, rows))

    def tolerance(self, layer: MoELayer) -> float:
        """The smallest of all."""
        return min(backend.tolerance(layer) for backend in self._backends.values())

    def prepare(self, problem: Problem) -> JoinedRunner:
        """Every family's own weights and inputs. One that cannot be prepared fails when it is run, and alone."""
        runners: dict[str, Runner] = {}
        failed: dict[str, Exception] = {}
        for name, backend in self._backends.items():
            try:
                runners[name] = backend.prepare(problem)
            except Exception as error:  # a package of kernels may raise anything
                failed[name] = error
        return JoinedRunner(runners, failed)


class JoinedRunner:
    """Runs each tactic by its own family's runner."""

    def __init__(self, runners: dict[str, Runner], failed: dict[str, Exception]) -> None:
        self._runners, self._failed = runners, failed

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """See `Runner.run`."""
        name = family(tactic)
        if name in self._failed:
            error = self._failed[name]
            raise NoResultError(f"cannot be prepared: {type(error).__name__}: {error}")
        return self._runners[name].run(Tactic({key: value for key, value in tactic.items() if key != FAMILY}), draw)

    def reference(self, draw: int = 0) -> torch.Tensor:
        """There is none that all share.

        Raises:
            UnsupportedError: always; a tactic is checked where it is tuned.
        """
        raise UnsupportedError("Each family of kernels has weights of its own, so they share no reference.")
