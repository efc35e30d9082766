"""`Bench`: one prepared problem that answers how long a tactic takes and whether it is right.

A tactic that raises costs that tactic and nothing else: it is remembered with its reason and never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from moetune.backends.base import Backend, Problem
from moetune.measure.clock import Clock, clock_for
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch


class Bench:
    """Times and checks the tactics of one problem on its device.

    Args:
        backend: the family of kernels.
        problem: what they are given; its routings are what `draws` below number.
        clock: how time is taken; the device's own by default.

    Attributes:
        failures: the tactics that did not run or ran wrong, each with the reason.
    """

    def __init__(self, backend: Backend, problem: Problem, clock: Clock | None = None) -> None:
        self.failures: dict[Tactic, str] = {}
        self._runner = backend.prepare(problem)
        self._clock = clock or clock_for(problem.device)
        self._tolerance = backend.tolerance(problem.layer)
        self._warm: set[Tactic] = set()
        self._references: dict[int, torch.Tensor] = {}
        self._right: set[tuple[Tactic, int]] = set()

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> list[tuple[float, ...] | None]:
        """Paired samples in µs, by position of `tactics`; None for one that failed.

        Sample i of every tactic is taken in the same round, on draw `draws[i]`. Naming a tactic twice gives two
        independent series of it: an A/A comparison.
        """
        running = [tactic for tactic in tactics if self._runs(tactic, draws[0])]
        series = iter(self._clock.paired_samples([self._call(tactic) for tactic in running], draws))
        return [None if tactic in self.failures else tuple(next(series)) for tactic in tactics]

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Whether the output on `draw` is within the backend's tolerance of the fp32 reference."""
        if tactic not in self.failures and (tactic, draw) not in self._right:
            error = self._relative_error(tactic, draw)
            if error <= self._tolerance:
                self._right.add((tactic, draw))
            else:  # NaN too
                self.failures[tactic] = f"wrong result: relative error {error:.1e}, allowed {self._tolerance:.0e}"
        return tactic not in self.failures

    def _relative_error(self, tactic: Tactic, draw: int) -> float:
        if draw not in self._references:
            self._references[draw] = self._runner.reference(draw)
        reference = self._references[draw]
        difference = (self._runner.run(tactic, draw).float() - reference).norm()
        scale = reference.norm()
        return float(difference / scale) if scale else float(difference)

    def _call(self, tactic: Tactic) -> Callable[[int], object]:
        return partial(self._runner.run, tactic)

    def _runs(self, tactic: Tactic, draw: int) -> bool:
        if tactic not in self._warm and tactic not in self.failures:
            try:
                self._clock.warm_up(self._call(tactic), draw)
            except Exception as error:  # a kernel may raise anything
                self.failures[tactic] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self._warm.add(tactic)
        return tactic not in self.failures
