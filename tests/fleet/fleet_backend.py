"""Planted backends for workers in processes of their own. They are found there because tests/ is on the path."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from planted import PlantedBackend, PlantedRunner

from moetune.backends.base import Problem
from moetune.tuning import final_comparison

TIMES = {"default": 1.0, "fast": 0.5, "slow": 2.0}


@dataclass
class ShortBackend(PlantedBackend):
    """Compares for a short time, and first waits for `seconds` in each bucket."""

    seconds: float = 0.0

    def prepare(self, problem: Problem) -> PlantedRunner:
        final_comparison.SECONDS = 0.02
        time.sleep(self.seconds)
        return super().prepare(problem)


@dataclass
class HangingBackend(ShortBackend):
    """Hangs in one bucket, at `rows` rows of the regime with seed `seed`, until its process is killed.

    It writes the process's id into the file `hung` before. Where that file exists it no longer hangs.
    """

    seed: int = 5
    rows: int = 8
    hung: Path = Path()

    def prepare(self, problem: Problem) -> PlantedRunner:
        if (problem.regime.seed, problem.rows) == (self.seed, self.rows) and not self.hung.exists():
            part = self.hung.with_suffix(".part")
            part.write_text(str(os.getpid()))
            part.rename(self.hung)
            time.sleep(600)
        return super().prepare(problem)
