"""A backend whose tactics take planted times that depend on the distribution."""

from __future__ import annotations

from dataclasses import dataclass, field

import planted_time
import torch
from planted import PlantedBackend, PlantedRunner

from moetune.backends.base import Problem
from moetune.spec.tactic import Tactic

Table = dict[tuple[str, str], float]
"""Times in ms by algorithm and distribution."""


@dataclass
class SkewedBackend(PlantedBackend):
    """A backend whose tactics take the times of `table`."""

    table: Table = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table) -> SkewedBackend:
        """Returns the backend with the algorithms of a table."""
        return cls(milliseconds={name: 1.0 for name, _ in table}, table=table)

    def prepare(self, problem: Problem) -> SkewedRunner:
        planted_time.install()
        return SkewedRunner(self, problem, table=self.table)


@dataclass
class SkewedRunner(PlantedRunner):
    table: Table = field(default_factory=dict)

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        distribution = self.problem.draws[draw].distribution or self.problem.regime.distribution
        planted_time.spend(self.table[str(tactic["algorithm"]), distribution])
        return self.reference(draw)
