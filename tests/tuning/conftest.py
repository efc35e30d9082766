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
