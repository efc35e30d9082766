from __future__ import annotations

import pytest
from stored import BASE, DAMAGE, ProfileOf, damage, differing_of, load, path_of

from moetune.errors import MissError
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.store import Store


def test_miss_on_another_device_names_the_backend_and_the_device_of_the_nearest(
    store: Store, profile_of: ProfileOf
) -> None:
    profile = profile_of(environment=Environment(device="NVIDIA H200", strict={"torch": "2.11", "cuda": "13"}))
    store.save(profile)
    cpu = Environment(device="AMD EPYC", strict={"torch": "2.13", "threads": "2"})
    with pytest.raises(MissError) as raised:
        store.load(profile.layer, profile.regime, "torch", cpu)
    assert raised.value.message == "No profile for AMD EPYC. The nearest was measured with torch on NVIDIA H200."
    assert "moetune tune" in raised.value.hint
    assert {difference.field for difference in raised.value.differences} == {"device", "torch", "cuda", "threads"}


def test_miss_on_another_device_names_what_the_nearest_kernel_does_otherwise(
    store: Store, profile_of: ProfileOf
) -> None:
    skips = Environment(device="NVIDIA H200", strict={"torch": "2.11", "remote": "drop"})
    profile = store.save(profile_of(environment=skips))
    writes_zeros = Environment(device="AMD EPYC", strict={"torch": "2.13", "remote": "zero"})
    with pytest.raises(MissError) as raised:
        store.load(profile.layer, profile.regime, "torch", writes_zeros)
    assert raised.value.message.endswith(" It has --remote drop instead of zero.")


def test_miss_in_an_empty_store_says_so(store: Store, profile_of: ProfileOf) -> None:
    with pytest.raises(MissError, match="is empty") as raised:
        load(store, profile_of())
    assert differing_of(raised.value) == {}
    assert not store.root.exists()


def test_miss_names_the_nearest_profile_and_prefers_the_same_layer(store: Store, profile_of: ProfileOf) -> None:
    asked = profile_of(BASE)
    other_layer = MoELayer(**{**asked.layer.model_dump(), "hidden_size": 128})
    store.save(profile_of(BASE, layer=other_layer))
    store.save(profile_of(Regime(**{**BASE.model_dump(), "seed": 7, "draws": 2})))
    nearest = store.save(profile_of(Regime(**{**BASE.model_dump(), "seed": 3})))
    with pytest.raises(MissError) as raised:
        load(store, asked)
    assert differing_of(raised.value) == {"seed": (0, 3)}
    assert raised.value.nearest == path_of(store, nearest)
    assert "seed 3 instead of 0" in raised.value.message
    assert "\n" not in str(raised.value)


def test_of_equally_near_profiles_the_one_of_the_nearest_size_is_the_nearest(
    store: Store, profile_of: ProfileOf
) -> None:
    for ep_size in (2, 4, 16):
        nearest = store.save(profile_of(Regime(ep_size=ep_size)))
    with pytest.raises(MissError) as raised:
        store.load(nearest.layer, Regime(ep_size=8), "torch", Environment(device="AMD EPYC", strict={}))
    assert differing_of(raised.value)["ep_size"] in ((8, 4), (8, 16))
    with pytest.raises(MissError) as raised:
        store.load(nearest.layer, Regime(ep_size=32), "torch", Environment(device="AMD EPYC", strict={}))
    assert raised.value.nearest == path_of(store, nearest)
    assert raised.value.message.endswith(" It has ep 16 instead of 32.")


def test_miss_names_the_nearest_of_both_folders(packaged: Store, backed: Store, profile_of: ProfileOf) -> None:
    strict = profile_of().environment.strict
    near = packaged.save(
        profile_of(environment=Environment(device="Example GPU 80GB", strict={**strict, "torch": "1"}))
    )
    backed.save(profile_of(environment=Environment(device="Other", strict={**strict, "torch": "1"})))
    with pytest.raises(MissError) as raised:
        load(backed, profile_of())
    assert differing_of(raised.value) == {"torch": ("2.13.0", "1")}
    assert raised.value.nearest == path_of(packaged, near)
    assert "torch 1 instead of 2.13.0" in raised.value.message


def test_miss_beside_damaged_files_still_names_the_nearest(store: Store, profile_of: ProfileOf) -> None:
    damage(store, profile_of(Regime(**{**BASE.model_dump(), "seed": 1})), DAMAGE["binary"])
    store.save(profile_of(Regime(**{**BASE.model_dump(), "draws": 5})))
    with pytest.raises(MissError) as raised:
        load(store, profile_of(BASE))
    assert differing_of(raised.value) == {"draws": (16, 5)}


def test_miss_names_every_difference_that_matters_and_no_neutral_one(store: Store, profile_of: ProfileOf) -> None:
    strict = {"torch": "2.11", "cuda": "13.0", "triton": "3.6.0", "kernel": "builtin", "remote": "drop"}
    h200 = Environment(device="NVIDIA H200", strict=strict)
    stored = store.save(profile_of(Regime(seed=3, draws=2), environment=h200, backend="triton"))
    asked = Environment(device="NVIDIA H200", strict={**strict, "torch": "2.14", "cuda": "13.1", "triton": "3.8.0"})
    with pytest.raises(MissError) as raised:
        store.load(stored.layer, Regime(ladder="adaptive"), "triton", asked)
    assert raised.value.message.endswith(
        " The nearest has seed 3 instead of 0, draws 2 instead of 16, ladder pow2 instead of adaptive and triton 3.6.0 "
        "instead of 3.8.0."
    )
    assert {"torch", "cuda"} <= differing_of(raised.value).keys()
    assert raised.value.taken_with == ()


def test_miss_of_another_model_names_it_instead_of_its_sizes(store: Store, profile_of: ProfileOf) -> None:
    asked = profile_of(BASE)
    other = MoELayer(**{**asked.layer.model_dump(), "hidden_size": 128, "name": "other"})
    store.save(profile_of(BASE, layer=other))
    with pytest.raises(MissError) as raised:
        load(store, asked)
    assert raised.value.message.endswith(" The nearest is of other.")


@pytest.mark.parametrize(
    ("device", "triton", "options"),
    [
        ("NVIDIA H200", "3.6.0", ("--ladder", "pow2")),
        ("NVIDIA H200", "3.8.0", ("--ladder", "pow2", "--near")),
        ("NVIDIA H100", "3.6.0", ()),
        ("AMD EPYC", "3.8.0", ("--device-name", "NVIDIA H200", "--ladder", "pow2")),
    ],
)
def test_miss_gives_the_options_that_take_a_profile_of_other_buckets(
    store: Store, profile_of: ProfileOf, device: str, triton: str, options: tuple[str, ...]
) -> None:
    strict = {"compute_capability": "9.0", "triton": "3.6.0", "kernel": "builtin"}
    h200 = Environment(device="NVIDIA H200", strict=strict)
    stored = store.save(profile_of(Regime(), environment=h200, backend="triton"))
    here = {**strict, "triton": triton} if device.startswith("NVIDIA") else {"cpu": device, "kernel": "builtin"}
    asked = Environment(device=device, strict=here)
    with pytest.raises(MissError) as raised:
        store.load(stored.layer, Regime(ladder="adaptive"), "triton", asked)
    assert raised.value.taken_with == options
