"""Profiles to store: complete, valid, and quick to make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
ENVIRONMENT = Environment(device="Example GPU 80GB", strict={"torch": "2.13.0", "threads": "2"})


def make_choice(rows: int, **changed: Any) -> Choice:
    given: dict[str, Any] = {
        "rows": rows,
        "tactic": {"tile": rows},
        "time_us": 10.0 + rows,
        "default_tactic": {"tile": 0},
        "default_time_us": 12.5 + rows,
        "gain": 1.25,
        "gain_low": 1.1,
        "gain_high": 1.4,
        "noise": 0.01,
        "stress_us": {"2": 11.5},
        "default_stress_us": {"2": 12.5},
        "tried": 5,
        "candidates": 6,
        "rejected": ({"tactic": {"tile": -1}, "reason": "does not compile"},),
        "load": (rows, 0),
        "max_load": rows,
        "measured_at": "2026-01-01T00:00:00Z",
    }
    return Choice(**{**given, **changed})


def make_profile(regime: Regime | None = None, rows: Iterable[int] | None = None, **changed: Any) -> Profile:
    """A profile of LAYER in ENVIRONMENT by `torch`, with a choice for each of `rows`, by default every bucket."""
    regime = regime or Regime(ep_size=4, attention_dp=True, tune_max_num_tokens=16)
    choices = tuple(make_choice(size) for size in (regime.buckets if rows is None else rows))
    given = {"layer": LAYER, "regime": regime, "backend": "torch", "environment": ENVIRONMENT, "choices": choices}
    return Profile(**{**given, **changed})


@pytest.fixture(scope="session")
def choice_of() -> Callable[..., Choice]:
    return make_choice


@pytest.fixture(scope="session")
def profile_of() -> Callable[..., Profile]:
    return make_profile
