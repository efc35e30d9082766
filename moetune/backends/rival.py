"""Defines `Rival`, a backend whose kernels offer no choice. It is timed so that tuned kernels can be compared with it.

An engine selects its kernels by one flag, so a comparison that leaves some of them out cannot say which flag is best.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from moetune.backends.base import Backend, Candidates, Default, Problem, Runner
from moetune.errors import UnsupportedError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

ONLY_TACTIC: Final = Tactic(kernel="fixed")
"""The one candidate of every rival."""


class Rival(Backend):
    """A backend with one tactic. No engine reads a file of it: the engine's flag alone selects it."""

    rival = True

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns `ONLY_TACTIC`.

        Raises:
            UnsupportedError: this layer is not computed.
        """
        self._require_layer(layer, regime)
        return Candidates((ONLY_TACTIC,))

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns `ONLY_TACTIC`."""
        return ONLY_TACTIC

    def explained_default(self, layer: MoELayer, regime: Regime, rows: int) -> Default:
        """Returns `ONLY_TACTIC`."""
        return Default(ONLY_TACTIC, "these kernels offer no choice")

    def prepare(self, problem: Problem) -> Runner:
        """Puts weights, inputs and routings on the device, and runs the kernels once on each draw.

        A rival's kernels may be compiled when they first run with a row count or a load. A preparation may take that
        long; a tactic's first run may not.

        Raises:
            UnsupportedError: this layer is not computed, or this machine cannot run the kernels.
        """
        self._require_layer(problem.layer, problem.regime)
        if obstacle := self.unavailable():
            raise UnsupportedError(f"The backend {self.name} cannot run here: {obstacle[0]}.", obstacle[1])
        import torch

        runner = self.prepared(problem)
        for draw in range(len(problem.draws)):
            runner.run(ONLY_TACTIC, draw)
        if torch.device(problem.device).type == "cuda":
            torch.cuda.synchronize(problem.device)
        return runner

    @abstractmethod
    def prepared(self, problem: Problem) -> Runner:
        """Returns the runner of a problem whose layer it computes, on a machine that can run the kernels."""

    def _require_layer(self, layer: MoELayer, regime: Regime) -> None:
        if reason := self.unsupported(layer, regime):
            raise UnsupportedError(f"The backend {self.name} {reason}.", "Use another backend.")
