import sys
from types import SimpleNamespace

import planted_time
import pytest
from planted import PlantedBackend

from moetune.backends import registry


@pytest.fixture
def plant(monkeypatch):
    def _plant(**planted):
        backend = PlantedBackend(**planted)
        real = registry.backend
        monkeypatch.setattr(registry, "backend", lambda name: backend if name == "planted" else real(name))
        return backend

    return _plant


@pytest.fixture
def planted_budget(monkeypatch):
    """A time budget is counted in planted time."""
    clock = SimpleNamespace(monotonic=lambda: planted_time.now_ns() / 1e9)
    for name in ("bucket_tuner", "run"):
        monkeypatch.setattr(sys.modules[f"moetune.tuning.{name}"], "time", clock)
