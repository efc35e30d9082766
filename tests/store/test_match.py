"""Which stored profile answers under other versions, for each backend."""

from __future__ import annotations

import pytest
from stored import ProfileOf, path_of

from moetune.backends.registry import backends
from moetune.errors import MissError
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
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
    "vllm": "0.26",
    "remote": "drop",
    "formula": "vllm",
}
CHANGED = {
    "torch": "2.14",
    "cuda": "13.2",
    "triton": "3.8",
    "kernel_source": "cd",
    "flashinfer": "0.7",
    "vllm": "0.33",
    "remote": "zero",
    "formula": "sglang",
}
SERVED = {
    "triton": {"torch": "neutral", "cuda": "neutral", "triton": "near", "kernel_source": "near"},
    "batched-triton": {"torch": "neutral", "cuda": "neutral", "triton": "near", "kernel_source": "near"},
    "flashinfer-cutlass": {"torch": "neutral", "cuda": "near"},
    "flashinfer-trtllm": {"torch": "neutral", "cuda": "near"},
    "flashinfer-trtllm-routed": {"torch": "neutral", "cuda": "near"},
    "flashinfer-fp8-block": {"torch": "neutral", "cuda": "near", "flashinfer": "near"},
    "triton-kernels": {"torch": "neutral", "cuda": "neutral", "triton": "near", "kernel_source": "near"},
    "humming": {"torch": "neutral", "cuda": "near"},
    "marlin": {"torch": "neutral", "cuda": "near", "vllm": "near"},
    "deep-gemm": {"torch": "neutral", "cuda": "near", "vllm": "near"},
    "batched-deep-gemm": {"torch": "neutral", "cuda": "near", "vllm": "near"},
    "vllm-cutlass": {"torch": "neutral", "cuda": "near", "vllm": "near"},
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


VLLM = Regime(ep_size=2, attention_dp=True, ladder="vllm")
ADAPTIVE = Regime(ep_size=2, attention_dp=True, ladder="adaptive")


def test_a_profile_of_the_ladder_vllm_answers_a_question_with_adaptive(store: Store, profile_of: ProfileOf) -> None:
    stored = store.save(profile_of(VLLM, backend="triton", environment=machine()))
    asked = profile_of(ADAPTIVE, backend="triton", environment=machine())
    found = match(store, asked)
    assert (found.profile, found.near, found.neutral, found.measured_ladder) == (stored, {}, {}, "vllm")
    assert [choice.rows for choice in found.profile.choices] == list(VLLM.buckets)
    assert match(store, stored).measured_ladder is None
    with pytest.raises(MissError) as missed:
        match(store, asked, exact=True)
    assert [each.field for each in missed.value.differences] == ["ladder"]


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (ADAPTIVE, VLLM),
        (VLLM, Regime(ep_size=2, attention_dp=True, ladder="hybrid")),
        (Regime(ep_size=2, attention_dp=True, ladder="pow2"), ADAPTIVE),
        (Regime(ep_size=2, attention_dp=True, ladder="vllm/2"), ADAPTIVE),
        (Regime(ep_size=4, attention_dp=True, ladder="vllm"), ADAPTIVE),
        (Regime(ep_size=2, attention_dp=True, ladder="vllm", seed=1), ADAPTIVE),
        (Regime(ep_size=2, attention_dp=True, ladder="vllm", tune_max_num_tokens=100), ADAPTIVE),
    ],
)
def test_no_other_ladder_answers_and_no_other_field_may_differ(
    stored: Regime, asked: Regime, store: Store, profile_of: ProfileOf
) -> None:
    store.save(profile_of(stored, backend="triton", environment=machine()))
    with pytest.raises(MissError) as missed:
        match(store, profile_of(asked, backend="triton", environment=machine()), near=True)
    assert missed.value.differences


@pytest.mark.parametrize("maximum", [100, 5000, 20000])
def test_a_maximum_that_both_ladders_have_is_no_other_question(
    maximum: int, store: Store, profile_of: ProfileOf
) -> None:
    """The ladder `vllm` ends at 4096, so a maximum of 5000 is in the key of `adaptive` only."""
    regimes = [
        Regime(ep_size=2, attention_dp=True, ladder=name, tune_max_num_tokens=maximum) for name in ("vllm", "adaptive")
    ]
    stored, asked = (profile_of(regime, backend="triton", environment=machine()) for regime in regimes)
    store.save(stored)
    assert match(store, asked).profile == stored


def test_the_ladder_of_the_question_comes_first_and_near_versions_last(
    backed: Store, packaged: Store, profile_of: ProfileOf
) -> None:
    """Each profile is preferred to those before it. A neutral version counts less than the ladder."""
    order = [
        (VLLM, machine(triton="3.8")),
        (ADAPTIVE, machine(triton="3.8")),
        (VLLM, machine(torch="2.14")),
        (VLLM, machine()),
        (ADAPTIVE, machine(torch="2.14")),
        (ADAPTIVE, machine()),
    ]
    asked = profile_of(ADAPTIVE, backend="triton", environment=machine())
    for number, (regime, environment) in enumerate(order):
        to = packaged if number % 2 else backed
        stored = to.save(profile_of(regime, backend="triton", environment=environment))
        found = match(backed, asked, near=True)
        assert found.profile == stored
        assert found.measured_ladder == ("vllm" if regime is VLLM else None)
        assert found.near.keys() == ({"triton"} if environment.strict["triton"] == "3.8" else set())
        assert found.neutral.keys() == ({"torch"} if environment.strict["torch"] == "2.14" else set())


def test_a_miss_does_not_name_a_ladder_that_would_answer(store: Store, profile_of: ProfileOf) -> None:
    other = Regime(ep_size=4, attention_dp=True, ladder="vllm")
    store.save(profile_of(Regime(ep_size=4, attention_dp=True, ladder="hybrid"), backend="triton"))
    stored = store.save(profile_of(other, backend="triton"))
    with pytest.raises(MissError) as missed:
        match(store, profile_of(ADAPTIVE, backend="triton"))
    assert missed.value.message.endswith(" The nearest has ep 4 instead of 2.")
    assert missed.value.nearest == path_of(store, stored)


def test_a_miss_beside_an_empty_profile_of_the_ladder_vllm_names_the_ladder(
    store: Store, profile_of: ProfileOf
) -> None:
    store.save(profile_of(VLLM, backend="triton", rows=[]))
    with pytest.raises(MissError, match="ladder vllm instead of adaptive"):
        match(store, profile_of(ADAPTIVE, backend="triton"))
