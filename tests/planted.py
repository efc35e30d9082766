"""A backend whose tactics take planted times and fail in planted ways."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass, field

import planted_time
import torch

from moetune.backends.base import Backend, Candidates, Problem
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, precision="fp32")


def tactic(name: str) -> Tactic:
    return Tactic(algorithm=name)


@dataclass
class PlantedBackend(Backend):
    """`milliseconds` by algorithm; algorithms in the sets do what the names say, in `killing` to their process.

    `milliseconds_at`: other times of an algorithm at a row count, `milliseconds_from` from that many rows on.
    `wrong_after`: how often an algorithm is right.
    """

    milliseconds: dict[str, float]
    raising: frozenset[str] = frozenset()
    wrong: frozenset[str] = frozenset()
    wrong_on_odd_draws: frozenset[str] = frozenset()
    wrong_under_stress: frozenset[str] = frozenset()
    wrong_after: dict[str, int] = field(default_factory=dict)
    milliseconds_at: dict[tuple[str, int], float] = field(default_factory=dict)
    milliseconds_from: dict[tuple[str, int], float] = field(default_factory=dict)
    cliff: frozenset[str] = frozenset()
    killing: frozenset[str] = frozenset()
    name: str = "planted"
    prepared: list[int] = field(default_factory=list)

    def unavailable(self) -> tuple[str, str] | None:
        return None

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        return None

    def environment(self) -> dict[str, str]:
        return {"planted": "1"}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        return Candidates(tuple(map(tactic, self.milliseconds)), {tactic("huge"): "its scratch would not fit"})

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        return tactic("default")

    def tolerance(self, layer: MoELayer) -> float:
        return 1e-5

    def prepare(self, problem: Problem) -> PlantedRunner:
        planted_time.install()
        self.prepared.append(problem.rows)
        return PlantedRunner(self, problem)


@dataclass
class PlantedRunner:
    backend: PlantedBackend
    problem: Problem
    runs: Counter[str] = field(default_factory=Counter)

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        name = str(tactic["algorithm"])
        if name in self.backend.raising:
            raise RuntimeError("planted failure\nwith a second line")
        if name in self.backend.killing:
            os.kill(os.getpid(), signal.SIGKILL)
        of_draw = self.problem.draws[draw]
        slower = 10 if of_draw.kind == "stress" and name in self.backend.cliff else 1
        planted_time.spend(self._milliseconds(name, of_draw.rows) * slower)
        self.runs[name] += 1
        return self.reference(draw) * (2.0 if self._is_wrong(name, draw) else 1.0)

    def _milliseconds(self, name: str, rows: int) -> float:
        later = {
            since: ms for (one, since), ms in self.backend.milliseconds_from.items() if one == name and since <= rows
        }
        usual = later[max(later)] if later else self.backend.milliseconds[name]
        return self.backend.milliseconds_at.get((name, rows), usual)

    def _is_wrong(self, name: str, draw: int) -> bool:
        backend = self.backend
        return (
            name in backend.wrong
            or (name in backend.wrong_on_odd_draws and draw % 2 == 1)
            or (name in backend.wrong_under_stress and self.problem.draws[draw].kind == "stress")
            or self.runs[name] > backend.wrong_after.get(name, self.runs[name])
        )

    def reference(self, draw: int = 0) -> torch.Tensor:
        return torch.ones(self.problem.rows, self.problem.layer.hidden_size)
