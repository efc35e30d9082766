"""Runs the command line with a planted backend, and with three workers where it says `--ray local`."""

from __future__ import annotations

import os
from functools import partial

from fleet_backend import TIMES, ShortBackend
from processes import GIVE_UP_S

from moetune.backends import registry
from moetune.fleet import ray_cluster
from moetune.fleet import run as fleet_run


def plant() -> None:
    """Makes the backend known in this process. The workers get it with their orders."""
    backend = ShortBackend(TIMES, seconds=float(os.environ.get("BUCKET_S", "0")))
    real = registry.backend
    registry.backend = lambda name, **options: backend if name == backend.name else real(name, **options)
    ray_cluster.RayCluster = partial(ray_cluster.RayCluster, local_gpus=3)
    ray_cluster.START_S = GIVE_UP_S
    fleet_run.run = partial(fleet_run.run, isolate=False)


if __name__ == "__main__":
    from moetune.__main__ import main

    plant()
    main()
