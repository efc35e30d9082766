"""Profiles to store: complete, valid, and quick to make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from choices import make_choice

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
ENVIRONMENT = Environment(device="Example GPU 80GB", strict={"torch": "2.13.0", "threads": "2"})


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


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def packaged(tmp_path: Path) -> Store:
    """What moetune comes with, as the store that made it."""
    return Store(tmp_path / "packaged")


@pytest.fixture
def backed(store: Store, packaged: Store) -> Store:
    """The store, which falls back to the packaged profiles."""
    return Store(store.root, packaged.root)
