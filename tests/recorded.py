"""Recorded tables: every tactic's time on a real GPU, and its noise, replayed without one.

To sample the routings of a table's cells takes ten seconds, so their loads lie beside the tables. To write them:

    PYTHONPATH=. python tests/recorded.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from moetune.backends.grouped_triton import space
from moetune.backends.grouped_triton.cost_model import Machine
from moetune.inputs.presets import layer as layer_of
from moetune.search.base import Search
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import median
from moetune.workload.routing import realize

DATA = Path(__file__).parent / "data"
TABLES = sorted(DATA.glob("grouped_triton-*.json"))
LOADS = DATA / "loads"
"""A file for each table, of the same name. It has the loads of all draws, by cell, in the table's order."""
PAIR_TABLES = sorted(DATA.glob("flashinfer_cutlass-*-h200.json"))
H200 = Machine(132, 233472, 65536, 2048, 4.9e6, 8.0e6, 989e6)
"""As `space.machine` reads it off the device."""


@dataclass(frozen=True)
class Cell:
    """One load and row count: the true time in µs of every tactic, and by what factors one timing was off."""

    load: str
    rows: int
    truth: Mapping[Tactic, float]
    default: Tactic
    noise: tuple[float, ...]
    predicted_us: Mapping[Tactic, float]

    @property
    def best_us(self) -> float:
        return min(self.truth.values())

    def time_us(self, tactic: Tactic, rounds: int, chance: random.Random) -> float:
        """A mean of `rounds` timings, each off by a factor that was seen in this cell."""
        return self.truth[tactic] * sum(chance.choice(self.noise) for _ in range(rounds)) / rounds


@lru_cache
def cells(path: Path) -> tuple[Cell, ...]:
    """The cells of a table, by load and ascending rows.

    The truth of the tactics that were measured again, interleaved, is their median. All others have one timing; it is
    brought to the same scale, for a GPU under sustained load runs at another clock than in single timings.
    """
    table = json.loads(path.read_text())
    layer = layer_of(table["model"])
    tactics = [Tactic(dict(zip(table["names"], values, strict=True))) for values in table["configs"]]
    recorded_loads = json.loads((LOADS / path.name).read_text())
    found = []
    for cell, loads in zip(table["cells"], recorded_loads, strict=True):
        single = {tactic: us for tactic, us in zip(tactics, cell["single_us"], strict=True) if us is not None}
        rounds = {tactics[int(number)]: times for number, times in cell["finalists"].items()}
        again = {tactic: median(times) for tactic, times in rounds.items()}
        scale = median([again[tactic] / single[tactic] for tactic in again if tactic in single])
        truth = {tactic: us * scale for tactic, us in single.items()} | again
        noise = [us / again[tactic] for tactic, times in rounds.items() for us in times]
        noise += [single[tactic] * scale / again[tactic] for tactic in again if tactic in single]
        regime = Regime.model_validate(cell["regime"])
        default = tactics[cell["default"]]
        ordered = (default, *(tactic for tactic in truth if tactic != default))
        shapes = space.Shapes.of(layer, regime, cell["rows"])
        predicted = space.predicted_us(ordered, shapes, loads, H200, (9, 0))
        truth = {tactic: truth[tactic] for tactic in ordered}
        found.append(Cell(cell["load"], cell["rows"], truth, default, tuple(noise), predicted))
    return tuple(sorted(found, key=lambda cell: (cell.load, cell.rows)))


@cache
def _pair(gemm1: int, gemm2: int) -> Tactic:
    """Returns one tactic, for all buckets: to make 3645 for each takes longer than to search them."""
    return Tactic(gemm1=gemm1, gemm2=gemm2)


def recorded_pairs(path: Path) -> Generator[tuple[int, dict[Tactic, float]]]:
    """Yields µs by rows, of every pair: the sum of the two GEMMs' sweeps, less the pair that both hold (`pair_us`)."""
    for cell in json.loads(path.read_text())["cells"]:
        first, second = ({int(at): us for at, us in cell[f"{gemm}_us"].items()} for gemm in ("gemm1", "gemm2"))
        both = (first[cell["fixed"][0]] + second[cell["fixed"][1]]) / 2
        yield cell["rows"], {_pair(a, b): first[a] + second[b] - both for a in first for b in second}


def load_of(table: Mapping[str, Any], cell: int, draw: int) -> list[int]:
    """Samples the routing of a cell and a draw: the number of slots of each local expert."""
    found = table["cells"][cell]
    regime = Regime.model_validate(found["regime"])
    return realize(layer_of(table["model"]), regime, found["rows"], draw=draw).load.tolist()


@dataclass(frozen=True)
class Replay:
    """What a search did in one cell: its finalists, how many tactics it measured, and the chosen one's regret."""

    finalists: tuple[Tactic, ...]
    measured: int
    regret: float


def replay(search: Search, cell: Cell, chance: random.Random, final_rounds: int = 20) -> Replay:
    """Runs a search on a recorded cell, then the final: the best mean of many timings, the default among them."""
    measured: set[Tactic] = set()
    finalists = _searched(search, cell, chance, measured)
    final = {t: cell.time_us(t, final_rounds, chance) for t in dict.fromkeys((cell.default, *finalists))}
    chosen = min(final, key=lambda tactic: final[tactic])
    return Replay(finalists, len(measured), cell.truth[chosen] / cell.best_us - 1)


def _searched(search: Generator, cell: Cell, chance: random.Random, measured: set[Tactic]) -> tuple[Tactic, ...]:
    try:
        batch = next(search)
        while True:
            measured.update(batch.tactics)
            batch = search.send({t: cell.time_us(t, batch.rounds, chance) for t in batch.tactics})
    except StopIteration as stop:
        return stop.value


def write_loads() -> None:
    """Writes the loads of each table's draws."""
    for path in TABLES:
        table = json.loads(path.read_text())
        loads = [
            [load_of(table, number, draw) for draw in range(cell["regime"]["draws"])]
            for number, cell in enumerate(table["cells"])
        ]
        (LOADS / path.name).write_text(json.dumps(loads, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_loads()
