"""`Environment`, the machine and library versions of a measurement."""

from __future__ import annotations

import re

from moetune.spec.bounds import MOST_IN_A_FILE_NAME, Name, Names
from moetune.spec.model import FrozenModel, digest_of


class Environment(FrozenModel):
    """The machine and library versions of a measurement.

    `device` is the GPU's or the CPU's name. `strict` has, on a CPU: model, threads, torch; on a GPU: its name, compute
    capability, torch, CUDA, and what the backend adds. A profile is served only where every field of `strict` is equal
    that can change the rank of a tactic (see `store.versions`). `informative` (driver, host, moetune's version …) is
    kept and may differ.
    """

    device: Name
    strict: Names
    informative: Names = {}

    @property
    def device_slug(self) -> str:
        """Returns the device's name as a folder name."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "_", self.device).strip("_")
        return slug[:MOST_IN_A_FILE_NAME] if slug.strip(".") else "unknown"  # `..` would lead out of the store

    @property
    def digest(self) -> str:
        """Returns 16 hex digits over the device and the strict fields."""
        return digest_of({"device": self.device, **self.strict})

    def differing(self, other: Environment) -> dict[str, tuple[object, object]]:
        """Returns the strict fields in which `other` differs, as name → (this one's, the other's)."""
        mine = {"device": self.device, **self.strict}
        theirs = {"device": other.device, **other.strict}
        return {
            name: (mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        }
