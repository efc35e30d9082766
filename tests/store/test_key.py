from __future__ import annotations

import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import BASE, ProfileOf, differing_of, files, load, path_of

from moetune.errors import MissError, UsageError
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.miss import FIELD_TITLES
from moetune.store.store import Store


def test_path_is_device_layer_regime_backend(store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of()
    expected = (
        f"Example_GPU_80GB/{profile.layer.slug}/{profile.regime.slug}-{profile.regime.digest}/"
        f"torch-{profile.environment.digest}.json"
    )
    assert path_of(store, profile) == store.root / expected
    store.save(profile)
    assert files(store) == {store.root / expected}


@pytest.mark.parametrize("backend", ["", "../torch", "a/b", ".hidden", "naïve"])
def test_backend_that_is_no_file_name_is_refused(backend: str, store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of()
    with pytest.raises(UsageError, match="backend"):
        store.path(profile.layer, profile.regime, backend, profile.environment)


def test_another_name_or_driver_of_the_same_thing_hits(store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of()
    store.save(profile)
    renamed = profile.layer.model_copy(update={"name": "other"})
    environment = profile.environment.model_copy(update={"informative": {"driver": "999"}})
    assert store.load(renamed, profile.regime, "torch", environment) == profile
    merged = store.save(profile_of(rows=[2], layer=renamed, environment=environment))
    assert len(files(store)) == 1
    assert [choice.rows for choice in merged.choices] == list(profile.regime.buckets)


SKEWED = BASE.model_copy(update={"redundant_experts": 2, "distribution": "zipf:1", "eplb": "vllm"})
SEVERAL = BASE.model_copy(update={"also": ("zipf:1=0.5",), "objective": "mean"})
CHANGED: dict[str, tuple[Regime, dict[str, Any]]] = {
    "ep_size": (BASE, {"ep_size": 4}),
    "tp_size": (BASE, {"tp_size": 2}),
    "attention_dp": (BASE, {"attention_dp": False, "dispatch": "none", "layout": None}),
    "dispatch": (BASE, {"dispatch": "allgather", "layout": None}),
    "layout": (BASE, {"layout": "slot"}),
    "redundant_experts": (BASE, {"redundant_experts": 2}),
    "eplb": (SKEWED, {"eplb": "sglang"}),
    "distribution": (BASE, {"distribution": "balanced"}),
    "also": (SEVERAL, {"also": ("zipf:1=0.25",)}),
    "objective": (SEVERAL, {"objective": "worst"}),
    "seed": (BASE, {"seed": 1}),
    "draws": (BASE, {"draws": 3}),
    "ladder": (BASE, {"ladder": "hybrid"}),
    "tune_max_num_tokens": (BASE, {"tune_max_num_tokens": 65}),
    "uneven_shards": (BASE, {"uneven_shards": True}),
    "rank": (BASE, {"rank": 1}),
}


def test_every_field_of_the_regime_has_its_case() -> None:
    assert CHANGED.keys() == Regime.model_fields.keys()


@pytest.mark.parametrize("field", CHANGED)
@pytest.mark.parametrize("asked_first", [True, False])
def test_one_regime_never_serves_another_and_the_miss_names_the_field(
    field: str, asked_first: bool, store: Store, profile_of: ProfileOf
) -> None:
    base, changed = CHANGED[field]
    one = profile_of(base)
    other = profile_of(Regime(**{**base.model_dump(), **changed}))
    stored, asked = (other, one) if asked_first else (one, other)
    store.save(stored)
    with pytest.raises(MissError, match=rf"\b{FIELD_TITLES.get(field, field)}\b") as raised:
        load(store, asked)
    assert raised.value.exit_code == 3
    differing = differing_of(raised.value)
    wanted, found = differing[field]
    fields = ({"rank": 0, **each.regime.model_dump(mode="json")} for each in (asked, stored))
    assert [wanted, found] == [", ".join(each[field]) if field == "also" else each[field] for each in fields]
    assert differing.keys() <= changed.keys() | {field}
    store.save(asked)
    assert load(store, asked) == asked
    assert load(store, stored) == stored


VALUES = {
    "ep_size": st.sampled_from([1, 2, 4]),
    "tp_size": st.sampled_from([1, 2]),
    "attention_dp": st.booleans(),
    "dispatch": st.sampled_from(["none", "alltoall", "allgather"]),
    "layout": st.sampled_from(["packed", "deduplicated", "slot", "pool"]),
    "redundant_experts": st.sampled_from([0, 4]),
    "distribution": st.sampled_from(["balanced", "random"]),
    "seed": st.integers(0, 2),
    "draws": st.sampled_from([1, 16]),
    "ladder": st.sampled_from(["pow2", "hybrid", "vllm", "1,2,4", "pow2/2"]),
    "tune_max_num_tokens": st.sampled_from([16, 8192]),
    "uneven_shards": st.booleans(),
}


def is_legal(given: dict[str, Any]) -> bool:
    try:
        Regime(**given)
    except UsageError:
        return False
    return True


SPELLINGS = st.fixed_dictionaries({}, optional=VALUES).filter(is_legal)


@settings(max_examples=60)
@given(stored=SPELLINGS, asked=SPELLINGS)
def test_profile_is_served_exactly_when_the_regimes_are_equal(
    stored: dict[str, Any], asked: dict[str, Any], profile_of: ProfileOf
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        profile = store.save(profile_of(Regime(**stored), rows=[]))
        question = profile_of(Regime(**asked), rows=[])
        theirs, ours = profile.regime.model_dump(mode="json"), question.regime.model_dump(mode="json")
        differing = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        if differing:
            with pytest.raises(MissError) as raised:
                load(store, question)
            assert differing_of(raised.value) == differing
            assert str(raised.value).count(" instead of ") == len(differing)
        else:
            assert load(store, question) == profile


@pytest.mark.parametrize("dp", [True, False])
def test_defaults_given_or_not_are_one_question(dp: bool, store: Store, profile_of: ProfileOf) -> None:
    short = Regime(ep_size=2, attention_dp=dp)
    spelled_out = Regime(**short.model_dump())
    profile = store.save(profile_of(short))
    assert store.load(profile.layer, spelled_out, "torch", profile.environment) == profile


LAYER_CHANGES: dict[str, Any] = {
    "num_experts": 32,
    "top_k": 2,
    "hidden_size": 128,
    "intermediate_size": 64,
    "precision": "fp16",
    "activation": "gelu",
    "expert_bias": True,
    "weight_on_input": True,
    "num_shared_experts": 1,
    "routing": {"scoring": "sigmoid"},
}


def test_every_field_of_the_layers_shape_has_its_case() -> None:
    assert LAYER_CHANGES.keys() == MoELayer.model_fields.keys() - {"name"}


@pytest.mark.parametrize("field", LAYER_CHANGES)
def test_another_layer_misses_and_the_field_is_named(field: str, store: Store, profile_of: ProfileOf) -> None:
    stored = store.save(profile_of())
    layer = MoELayer(**{**stored.layer.model_dump(), field: LAYER_CHANGES[field]})
    with pytest.raises(MissError, match=rf"\b{FIELD_TITLES.get(field, field)}\b") as raised:
        store.load(layer, stored.regime, "torch", stored.environment)
    assert differing_of(raised.value).keys() == {field}


def test_another_backend_misses_and_is_named(store: Store, profile_of: ProfileOf) -> None:
    stored = store.save(profile_of())
    with pytest.raises(MissError) as raised:
        store.load(stored.layer, stored.regime, "triton", stored.environment)
    assert differing_of(raised.value) == {"backend": ("triton", "torch")}


@pytest.mark.parametrize(
    ("environment", "differing"),
    [
        (Environment(device="Example GPU 80GB", strict={"torch": "2.9", "threads": "2"}), {"torch": ("2.9", "2.13.0")}),
        (Environment(device="Example GPU 80GB", strict={"torch": "2.13.0"}), {"threads": (None, "2")}),
        (
            Environment(device="Example GPU 80GB", strict={"torch": "2.13.0", "threads": "2", "cuda": "13"}),
            {"cuda": ("13", None)},
        ),
        (
            Environment(device="Other", strict={"torch": "2.13.0", "threads": "2"}),
            {"device": ("Other", "Example GPU 80GB")},
        ),
    ],
)
def test_strict_environment_must_match(
    environment: Environment, differing: dict[str, Any], store: Store, profile_of: ProfileOf
) -> None:
    stored = store.save(profile_of())
    with pytest.raises(MissError) as raised:
        store.load(stored.layer, stored.regime, "torch", environment)
    assert differing_of(raised.value) == differing


def test_hand_copied_file_is_not_served(store: Store, profile_of: ProfileOf) -> None:
    stored = store.save(profile_of(BASE))
    asked = profile_of(Regime(**{**BASE.model_dump(), "attention_dp": False, "dispatch": "none", "layout": None}))
    copied = path_of(store, asked)
    copied.parent.mkdir(parents=True)
    copied.write_bytes(path_of(store, stored).read_bytes())
    with pytest.raises(MissError, match="attention_dp"):
        load(store, asked)
    assert copied.read_bytes() == path_of(store, stored).read_bytes()
