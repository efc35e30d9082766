"""The command line with a planted backend, for batches; the variable `DIES_AT` kills it as it prepares that problem.

Run as a script: `python tests/batching.py batch FILE --store DIR`.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from functools import partial

from planted import PlantedBackend

from moetune.backends import registry
from moetune.tuning import batch_run, final_comparison


@dataclass
class CountingBackend(PlantedBackend):
    dies_at: int = int(os.environ.get("DIES_AT", "0"))

    def prepare(self, problem):
        if len(self.prepared) + 1 == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(problem)


def plant(backend: PlantedBackend) -> None:
    """Makes the backend known by its name, and has batches run it in their own process."""
    real = registry.backend
    registry.backend = lambda name, **options: backend if name == backend.name else real(name, **options)
    batch_run.run = partial(
        lambda run, tasks, *rest: run([replace(task, isolate=False) for task in tasks], *rest), batch_run.run
    )
    final_comparison.SECONDS = 0.02


if __name__ == "__main__":
    from moetune.__main__ import main

    plant(CountingBackend({"default": 1.0, "fast": 0.5}))
    main()
