"""The planted op of the tests of the CUTLASS backend."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Any:
    """See `planted_cutlass.plant`."""
    planted = pytest.importorskip("planted_cutlass")
    return planted.plant(monkeypatch)
