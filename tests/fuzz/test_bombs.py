"""Inputs that are made to cost time or memory cost little. `python -m tests.fuzz` says how little."""

from __future__ import annotations

import pytest

from fuzz.bombs import BOMBS, cost_of
from fuzz.run import ANYWHERE_SECONDS, MOST_BYTES, MOST_MESSAGE

pytestmark = pytest.mark.no_cover


@pytest.mark.parametrize("name", BOMBS)
def test_an_input_made_to_cost_time_or_memory_costs_little(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cost = cost_of(name, tmp_path)
    assert cost.seconds < ANYWHERE_SECONDS
    assert cost.grown_bytes < MOST_BYTES
    assert len(cost.refused) < MOST_MESSAGE
