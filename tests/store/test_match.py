"""Which stored profile answers under other versions, for each backend."""

from __future__ import annotations

import pytest
from stored import ProfileOf, path_of

from moetune.backends.registry import backends
from moetune.errors import MissError
from moetune.spec.environment import Environment
from moetune.store.match import Match
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.store.versions import versions_of

STRICT = {
    "torch": "2.11",
    "cuda": "13.0",
    "triton": "3.6",
    "kernel_source": "ab",
    "flashinfer": "0.6",
    "remote": "drop",
}
CHANGED = {
    "torch": "2.14",
    "cuda": "13.2",
    "triton": "3.8",
    "kernel_source": "cd",
    "flashinfer": "0.7",
    "remote": "zero",
}
SERVED = {
    "triton": {"torch": "neutral", "cuda": "neutral", "triton": "near", "kernel_source": "near"},
    "flashinfer-cutlass": {"torch": "neutral", "cuda": "near"},
    "flashinfer-trtllm": {"torch": "neutral", "cuda": "near"},
    "flashinfer-trtllm-routed": {"torch": "neutral", "cuda": "near"},
    "torch": {"torch": "near", "cuda": "near"},
    "unknown": {},
}


def machine(**changed: str) -> Environment:
    return Environment(device="NVIDIA H200", strict={**STRICT, **changed})


def match(store: Store, asked: Profile, *, near: bool = False, exact: bool = False) -> Match:
    question = (asked.layer, asked.regime, asked.backend, asked.environment)
    return store.match(*question, near=near, exact=exact)


def test_every_backend_has_its_case() -> None:
    assert SERVED.keys() == {*backends(), "unknown"}


@pytest.mark.parametrize("field", CHANGED)
@pytest.mark.parametrize("backend", SERVED)
def test_one_changed_field_is_neutral_near_or_a_miss(
    backend: str, field: str, store: Store, profile_of: ProfileOf
) -> None:
    stored = store.save(profile_of(backend=backend, environment=machine()))
    asked = profile_of(backend=backend, environment=machine(**{field: CHANGED[field]}))
    differing = {field: {"wanted": CHANGED[field], "stored": STRICT[field]}}
    kind = SERVED[backend].get(field, "miss")
    if kind == "neutral":
        found = match(store, asked)
        assert (found.profile, found.near, found.neutral) == (stored, {}, differing)
        assert store.find(asked.layer, asked.regime, backend, asked.environment) == (path_of(store, stored), stored)
        with pytest.raises(MissError):
            match(store, asked, exact=True)
        return
    with pytest.raises(MissError) as missed:
        match(store, asked)
    assert missed.value.near is (kind == "near")
    assert ("--near" in missed.value.hint) is (kind == "near")
    assert f"{field} {STRICT[field]} instead of {CHANGED[field]}" in missed.value.message
    if kind == "near":
        found = match(store, asked, near=True)
        assert (found.profile, found.near, found.neutral) == (stored, differing, {})
    else:
        with pytest.raises(MissError):
            match(store, asked, near=True)


def test_an_exact_profile_wins_then_a_neutral_one_then_the_one_with_fewest_near_fields(
    packaged: Store, backed: Store, profile_of: ProfileOf
) -> None:
    asked = profile_of(backend="triton", environment=machine())
    order = [machine(triton="3.7", kernel_source="cd"), machine(triton="3.5", torch="2.9"), machine(torch="2.14")]
    for environment in order:
        stored = backed.save(profile_of(backend="triton", environment=environment))
        assert match(backed, asked, near=True).profile == stored
    exact = packaged.save(asked)
    found = match(backed, asked, near=True)
    assert (found.path, found.profile, found.differences) == (path_of(packaged, exact), exact, ())


def test_of_equally_near_profiles_the_one_with_more_buckets_wins(store: Store, profile_of: ProfileOf) -> None:
    whole = store.save(profile_of(backend="triton", environment=machine(torch="2.12")))
    store.save(profile_of(backend="triton", environment=machine(torch="2.13"), rows=[1, 2]))
    store.save(profile_of(backend="triton", environment=machine(torch="2.10"), rows=[]))
    assert match(store, profile_of(backend="triton", environment=machine())).profile == whole


def test_another_device_is_not_near_and_a_damaged_file_beside_stays(store: Store, profile_of: ProfileOf) -> None:
    other = Environment(device="NVIDIA H100", strict=STRICT)
    store.save(profile_of(backend="triton", environment=other))
    damaged = path_of(store, profile_of(backend="triton", environment=machine(torch="2.14")))
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}")
    with pytest.raises(MissError) as missed:
        match(store, profile_of(backend="triton", environment=machine()), near=True)
    assert not missed.value.near
    assert damaged.read_text() == "{}"


def test_a_neutral_field_is_not_near_too() -> None:
    assert not [name for name in SERVED if versions_of(name).neutral & versions_of(name).near]
