"""Stores with profiles in them, whole or damaged, and what a look-up finds there."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

from moetune.errors import MissError
from moetune.spec.regime import Regime
from moetune.store.lock import LOCK_NAME
from moetune.store.profile import Profile
from moetune.store.store import Store

ProfileOf = Callable[..., Profile]
BASE = Regime(ep_size=2, attention_dp=True, tune_max_num_tokens=64)


def path_of(store: Store, profile: Profile) -> Path:
    return store.path(profile.layer, profile.regime, profile.backend, profile.environment)


def load(store: Store, asked: Profile) -> Profile:
    """What the store answers to the question of `asked`."""
    return store.load(asked.layer, asked.regime, asked.backend, asked.environment)


def differing_of(miss: MissError) -> dict[str, tuple[object, object]]:
    return {difference.field: (difference.wanted, difference.stored) for difference in miss.differences}


def files(store: Store) -> set[Path]:
    return {path for path in store.root.rglob("*") if path.is_file() and path.name != LOCK_NAME}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "binary": lambda good: bytes(range(256)) * 8,
    "pickle": lambda good: pickle.dumps({"schema_version": 1}),
    "not an object": lambda good: b"[1, 2]",
    "deeply nested": lambda good: b"[" * 100_000,
    "a number too long": lambda good: b'{"schema_version": ' + b"9" * 5000 + b"}",
    "no schema": lambda good: good.replace(b"schema_version", b"schema"),
    "schema 0": lambda good: good.replace(b'"schema_version": 1', b'"schema_version": 0'),
    "schema in words": lambda good: good.replace(b'"schema_version": 1', b'"schema_version": "one"'),
    "schema true": lambda good: good.replace(b'"schema_version": 1', b'"schema_version": true'),
    "unknown field": lambda good: good.replace(b'"backend"', b'"surprise": 1, "backend"'),
    "illegal layer": lambda good: good.replace(b'"top_k": 4', b'"top_k": 400'),
    "illegal regime": lambda good: good.replace(b'"alltoall"', b'"pigeon"'),
    "illegal tactic": lambda good: good.replace(b'"tile": 1', b'"tile": [1]'),
    "time without value": lambda good: good.replace(b'"time_us": 11.0', b'"time_us": NaN'),
}


def damage(store: Store, profile: Profile, content: Callable[[bytes], bytes]) -> tuple[Path, bytes]:
    """The path of a saved profile whose file was damaged, and what it holds now."""
    store.save(profile)
    path = path_of(store, profile)
    good = path.read_bytes()
    bad = content(good)
    assert bad != good
    path.write_bytes(bad)
    return path, bad


def newer(good: bytes) -> bytes:
    return good.replace(b'"schema_version": 1', b'"schema_version": 2').replace(b'"backend"', b'"later": 1, "backend"')


def ensure_writable(store: Store, profile: Profile) -> None:
    store.ensure_writable(profile.layer, profile.regime, profile.backend, profile.environment)
