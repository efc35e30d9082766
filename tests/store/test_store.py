from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import moetune.store.store as store_module
from moetune.errors import DamagedProfileError, MissError, MoetuneError, NewerSchemaError, StoreError, UsageError
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import SCHEMA_VERSION, Choice, Profile
from moetune.store.store import Store

ProfileOf = Callable[..., Profile]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def path_of(store: Store, profile: Profile) -> Path:
    return store.path(profile.layer, profile.regime, profile.backend, profile.environment)


def load(store: Store, asked: Profile) -> Profile:
    """What the store answers to the question of `asked`."""
    return store.load(asked.layer, asked.regime, asked.backend, asked.environment)


def differing_of(miss: MissError) -> dict[str, tuple[object, object]]:
    return {difference.field: (difference.wanted, difference.stored) for difference in miss.differences}


def files(store: Store) -> set[Path]:
    return {path for path in store.root.rglob("*") if path.is_file() and path.name != store_module.LOCK_NAME}


# Where it lies


def test_root_is_the_variable_else_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOETUNE_STORE", raising=False)
    assert Store().root == tmp_path / "home/.cache/moetune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert Store().root == tmp_path / "home/.cache/moetune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store().root == tmp_path / "cache/moetune"
    monkeypatch.setenv("MOETUNE_STORE", "~/profiles")
    assert Store().root == tmp_path / "home/profiles"
    assert Store(tmp_path).root == tmp_path


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


# Save and load


def test_saved_profile_is_loaded(store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of()
    assert store.save(profile) == profile
    assert load(store, profile) == profile
    assert store.read(path_of(store, profile)) == profile
    assert list(store.profiles()) == [(path_of(store, profile), profile)]


def test_file_is_plain_versioned_json(store: Store, profile_of: ProfileOf) -> None:
    store.save(profile_of())
    document = json.loads(path_of(store, profile_of()).read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["regime"]["attention_dp"] is True
    assert document["choices"][0]["tactic"] == {"tile": 1}


def test_save_merges_by_bucket_and_the_newer_measurement_wins(
    store: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    early, late = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00+00:00"
    store.save(profile_of(choices=(choice_of(1, measured_at=late), choice_of(2, measured_at=early))))
    returned = store.save(
        profile_of(
            choices=(
                choice_of(1, measured_at=early, tactic={"tile": 91}),
                choice_of(2, measured_at=late, tactic={"tile": 92}),
                choice_of(8, measured_at=early, tactic={"tile": 98}),
            )
        )
    )
    assert [(choice.rows, choice.tactic["tile"]) for choice in returned.choices] == [(1, 1), (2, 92), (8, 98)]
    assert load(store, returned) == returned


def test_another_name_or_driver_of_the_same_thing_hits(store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of()
    store.save(profile)
    renamed = profile.layer.model_copy(update={"name": "other"})
    environment = profile.environment.model_copy(update={"informative": {"driver": "999"}})
    assert store.load(renamed, profile.regime, "torch", environment) == profile
    merged = store.save(profile_of(rows=[2], layer=renamed, environment=environment))
    assert len(files(store)) == 1
    assert [choice.rows for choice in merged.choices] == list(profile.regime.buckets)


SAVE_EACH_IN_A_PROCESS = """
import multiprocessing, pathlib, sys
from moetune.store.profile import Profile
from moetune.store.store import Store

def save(mine, barrier):
    profile = Profile.model_validate_json(mine.read_text())
    barrier.wait()
    Store(sys.argv[1]).save(profile)

fork = multiprocessing.get_context("fork")
mine = sorted(pathlib.Path(sys.argv[2]).iterdir())
barrier = fork.Barrier(len(mine))
processes = [fork.Process(target=save, args=(path, barrier)) for path in mine]
for process in processes:
    process.start()
for process in processes:
    process.join()
assert "torch" not in sys.modules
sys.exit(any(process.exitcode for process in processes))
"""


def test_thirty_two_processes_saving_at_once_lose_nothing(store: Store, profile_of: ProfileOf, tmp_path: Path) -> None:
    regime = Regime(ladder=list(range(1, 33)), tune_max_num_tokens=32)
    measured = tmp_path / "measured"
    measured.mkdir()
    for rows in regime.buckets:
        (measured / f"{rows}.json").write_text(profile_of(regime, [rows]).model_dump_json())
    subprocess.run([sys.executable, "-c", SAVE_EACH_IN_A_PROCESS, store.root, measured], check=True, timeout=100)
    complete = profile_of(regime)
    assert len(complete.choices) == 32
    assert load(store, complete) == complete
    assert files(store) == {path_of(store, complete)}


def test_reader_never_sees_half_a_file(store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of(Regime(ladder=list(range(1, 200)), tune_max_num_tokens=200))
    store.save(profile)
    path, writing = path_of(store, profile), threading.Event()

    def write() -> None:
        for _ in range(15):
            store.save(profile)
        writing.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not writing.is_set():
        assert Profile.model_validate_json(path.read_bytes()) == profile
        reads += 1
    writer.join()
    assert reads > 0


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_save_that_fails_leaves_the_old_file_and_no_litter(
    failing: str, store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.save(profile_of(rows=[1]))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
        with pytest.raises(StoreError, match="No space left") as raised:
            store.save(profile_of(rows=[2]))
    assert raised.value.exit_code == 1
    assert files(store) == {path_of(store, old)}
    assert load(store, old) == old


def test_file_and_folder_are_on_disk_before_save_returns(
    store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = path_of(store, profile_of()), []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append(("replace", self))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    store.save(profile_of())
    [renamed] = [index for index, (what, _) in enumerate(events) if what == "replace"]
    temporary = events[renamed][1]
    assert temporary.parent == path.parent
    assert ("fsync", temporary) in events[:renamed]
    assert ("fsync", path.parent) in events[renamed:]
    assert {("fsync", folder) for folder in (store.root, *path.parents[1:3])} <= set(events)


def test_lock_that_is_held_is_named(store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LOCK_TIMEOUT_S", 0.05)
    store.ensure_writable()
    with FileLock(store.root / store_module.LOCK_NAME), pytest.raises(StoreError, match="lock") as raised:
        store.save(profile_of())
    assert str(store.root) in str(raised.value)
    assert not files(store)


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_store_that_cannot_be_written_is_a_usage_error(below: str, tmp_path: Path, profile_of: ProfileOf) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / below)
    for attempt in (store.ensure_writable, lambda: store.save(profile_of())):
        with pytest.raises(UsageError, match="cannot be written") as raised:
            attempt()
        assert raised.value.exit_code == 2
        assert "\n" not in str(raised.value)
        assert str(store.root) in str(raised.value)
        assert "MOETUNE_STORE" in raised.value.hint
    with pytest.raises(MissError):
        load(store, profile_of())


def test_ensure_writable_leaves_nothing_behind(store: Store) -> None:
    store.ensure_writable()
    assert list(store.root.iterdir()) == []


# Misses

BASE = Regime(ep_size=2, attention_dp=True, tune_max_num_tokens=64)
CHANGED: dict[str, tuple[Regime, dict[str, Any]]] = {
    "ep_size": (BASE, {"ep_size": 4}),
    "tp_size": (BASE, {"tp_size": 2}),
    "attention_dp": (BASE, {"attention_dp": False, "dispatch": "none", "layout": None}),
    "dispatch": (BASE, {"dispatch": "allgather", "layout": None}),
    "layout": (BASE, {"layout": "slot"}),
    "redundant_experts": (BASE, {"redundant_experts": 2}),
    "distribution": (BASE, {"distribution": "balanced"}),
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
    with pytest.raises(MissError, match=rf"\b{field}\b") as raised:
        load(store, asked)
    assert raised.value.exit_code == 3
    differing = differing_of(raised.value)
    wanted, found = differing[field]
    assert wanted == {"rank": 0, **asked.regime.model_dump(mode="json")}[field]
    assert found == {"rank": 0, **stored.regime.model_dump(mode="json")}[field]
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


@settings(max_examples=60, deadline=None)
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
            assert str(raised.value).count(" instead of ") == min(len(differing), 3)
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
    with pytest.raises(MissError, match=rf"\b{field}\b") as raised:
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


def test_miss_on_another_device_names_the_device_and_versions_of_the_closest(
    store: Store, profile_of: ProfileOf
) -> None:
    profile = profile_of(environment=Environment(device="NVIDIA H200", strict={"torch": "2.11", "cuda": "13"}))
    store.save(profile)
    cpu = Environment(device="AMD EPYC", strict={"torch": "2.13", "threads": "2"})
    with pytest.raises(MissError) as raised:
        store.load(profile.layer, profile.regime, "torch", cpu)
    assert raised.value.message == (
        "No profile for AMD EPYC. The closest was measured on NVIDIA H200 (backend torch, torch 2.11)."
    )
    assert "moetune tune" in raised.value.hint
    assert {difference.field for difference in raised.value.differences} == {"device", "torch", "cuda", "threads"}


def test_of_equally_near_profiles_the_one_of_the_nearest_size_is_the_closest(
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
    assert raised.value.message.endswith(" It has ep_size 16 instead of 32.")


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


def test_hand_copied_file_is_not_served(store: Store, profile_of: ProfileOf) -> None:
    stored = store.save(profile_of(BASE))
    asked = profile_of(Regime(**{**BASE.model_dump(), "attention_dp": False, "dispatch": "none", "layout": None}))
    copied = path_of(store, asked)
    copied.parent.mkdir(parents=True)
    copied.write_bytes(path_of(store, stored).read_bytes())
    with pytest.raises(MissError, match="attention_dp"):
        load(store, asked)
    assert copied.read_bytes() == path_of(store, stored).read_bytes()


# Packaged profiles


@pytest.fixture
def packaged(tmp_path: Path) -> Store:
    """What moetune comes with, as the store that made it."""
    return Store(tmp_path / "packaged")


@pytest.fixture
def backed(store: Store, packaged: Store) -> Store:
    """The store, with the packaged profiles behind it."""
    return Store(store.root, packaged.root)


def test_the_packaged_root_is_the_installed_package_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETUNE_PACKAGED_PROFILES")
    root = store_module.packaged_root()
    assert root is not None
    assert (root / "README.md").is_file()
    assert Store().roots == (Store().root, root)
    monkeypatch.setenv("MOETUNE_PACKAGED_PROFILES", "0")
    assert store_module.packaged_root() is None
    assert Store().roots == (Store().root,)


def test_a_checkout_and_a_wheel_find_the_profiles_beside_their_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOETUNE_PACKAGED_PROFILES")
    package = tmp_path / "moetune"
    for folder in (package, tmp_path / "profiles"):
        folder.mkdir()
    assert store_module.packaged_root(package) != tmp_path / "profiles", (
        "a folder beside an installed package is not its own"
    )
    (tmp_path / "pyproject.toml").touch()
    assert store_module.packaged_root(package) == tmp_path / "profiles"
    (package / "profiles").mkdir()
    assert store_module.packaged_root(package) == package / "profiles"


def test_packaged_profile_answers_where_the_store_has_none(
    store: Store, packaged: Store, backed: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    theirs = packaged.save(profile_of(rows=[1, 2]))
    question = (theirs.layer, theirs.regime, theirs.backend, theirs.environment)
    before = {path: path.read_bytes() for path in packaged.root.rglob("*") if path.is_file()}
    path, found = backed.find(*question)
    assert (path, found) == (path_of(packaged, theirs), theirs)
    assert backed.is_packaged(path)
    assert backed.read(path) == theirs
    assert not store.root.exists()

    ours = store.save(profile_of(choices=(choice_of(1, tactic={"tile": 7}),)))
    path, found = backed.find(*question)
    assert (path, found) == (path_of(store, ours), ours)
    assert not backed.is_packaged(path)
    assert list(backed.profiles()) == [(path_of(store, ours), ours), (path_of(packaged, theirs), theirs)]
    assert {path: path.read_bytes() for path in packaged.root.rglob("*") if path.is_file()} == before


def test_save_takes_over_the_packaged_buckets_and_leaves_them_where_they_are(
    store: Store, packaged: Store, backed: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    packaged.save(profile_of(rows=[1, 2]))
    before = path_of(packaged, profile_of()).read_bytes()
    newer = choice_of(2, tactic={"tile": 92}, measured_at="2026-02-01T00:00:00Z")
    saved = backed.save(profile_of(choices=(newer, choice_of(8))))
    assert [(choice.rows, choice.tactic["tile"]) for choice in saved.choices] == [(1, 1), (2, 92), (8, 8)]
    assert load(store, saved) == saved
    assert path_of(packaged, saved).read_bytes() == before


@pytest.mark.parametrize("kind", ["truncated", "no schema", "schema 0"])
def test_damaged_packaged_profile_is_named_stays_and_costs_no_measurement(
    kind: str, store: Store, packaged: Store, backed: Store, profile_of: ProfileOf
) -> None:
    path, content = damage(packaged, profile_of(), DAMAGE[kind])
    with pytest.raises(DamagedProfileError, match="reinstall") as raised:
        load(backed, profile_of())
    assert str(path) in raised.value.message
    assert "MOETUNE_PACKAGED_PROFILES=0" in raised.value.hint
    assert path.read_bytes() == content
    assert not list(path.parent.glob("*.damaged-*"))
    saved = backed.save(profile_of(rows=[2]))
    assert load(store, saved) == saved
    assert path.read_bytes() == content


def test_packaged_profile_of_another_question_is_no_base(packaged: Store, backed: Store, profile_of: ProfileOf) -> None:
    other = packaged.save(profile_of(rows=[1], environment=Environment(device="Other", strict={})))
    asked = profile_of(rows=[2])
    path_of(packaged, asked).parent.mkdir(parents=True)
    path_of(packaged, asked).write_bytes(path_of(packaged, other).read_bytes())
    assert backed.save(asked) == asked


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


def test_store_that_is_the_packaged_folder_is_an_ordinary_one(packaged: Store, profile_of: ProfileOf) -> None:
    itself = Store(packaged.root, packaged.root)
    assert itself.roots == (packaged.root,)
    saved = itself.save(profile_of())
    assert not itself.is_packaged(path_of(itself, saved))


# Files that are no profiles

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


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_named_and_moved_aside_unharmed(kind: str, store: Store, profile_of: ProfileOf) -> None:
    path, content = damage(store, profile_of(), DAMAGE[kind])
    with pytest.raises(DamagedProfileError) as raised:
        load(store, profile_of())
    aside = path.with_name(path.name + ".damaged-1")
    assert raised.value.exit_code == 1
    assert "\n" not in str(raised.value)
    assert str(path) in raised.value.message
    assert str(aside) in raised.value.hint
    assert files(store) == {aside}
    assert aside.read_bytes() == content
    with pytest.raises(MissError):
        load(store, profile_of())


def test_damaged_files_never_overwrite_each_other(store: Store, profile_of: ProfileOf) -> None:
    for number in range(1, 4):
        path, _ = damage(store, profile_of(), lambda good, number=number: b"damage %d" % number)
        with pytest.raises(DamagedProfileError, match=f"damaged-{number}"):
            load(store, profile_of())
    kept = {aside.name.removeprefix(path.name): aside.read_text() for aside in files(store)}
    assert kept == {f".damaged-{number}": f"damage {number}" for number in range(1, 4)}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_one_value_of_the_file_becomes_is_read_missed_or_reported(
    data: st.DataObject, profile_of: ProfileOf
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, profile = Store(folder), profile_of(Regime(ladder="1,2", ep_size=2, layout="packed"))
        store.save(profile)
        path = path_of(store, profile)
        document = json.loads(path.read_text())
        node, key = data.draw(st.sampled_from(list(places(document))))
        value = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([]) | st.just({})
        node[key] = data.draw(value | st.lists(st.integers() | st.text(), max_size=3) | st.just({"a": None}))
        path.write_text(json.dumps(document))
        content = path.read_bytes()
        with suppress(DamagedProfileError, NewerSchemaError, MissError):
            assert load(store, profile).regime == profile.regime
        assert [file.read_bytes() for file in files(store)] == [content]


def places(node: Any) -> Any:
    """Every (container, key) of a JSON document."""
    for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(child, dict | list):
            yield from places(child)


@settings(max_examples=20, deadline=None)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_file_truncated_anywhere_is_moved_aside(kept: float, profile_of: ProfileOf) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        _, content = damage(store, profile_of(), lambda good: good.rstrip()[: int(kept * (len(good) - 1))])
        with pytest.raises(DamagedProfileError):
            load(store, profile_of())
        [aside] = files(store)
        assert aside.read_bytes() == content


def newer(good: bytes) -> bytes:
    return good.replace(b'"schema_version": 1', b'"schema_version": 2').replace(b'"backend"', b'"later": 1, "backend"')


def test_profile_of_a_newer_schema_stays_and_is_neither_read_nor_written(store: Store, profile_of: ProfileOf) -> None:
    path, content = damage(store, profile_of(), newer)
    for attempt in (load, Store.save):
        with pytest.raises(NewerSchemaError, match=r"schema_version 2.*Update moetune") as raised:
            attempt(store, profile_of())
        assert str(path) in raised.value.message
        assert raised.value.exit_code == 1
        assert files(store) == {path}
        assert path.read_bytes() == content


def test_save_onto_a_damaged_file_keeps_both_and_reports_it(store: Store, profile_of: ProfileOf) -> None:
    path, content = damage(store, profile_of(rows=[1]), DAMAGE["truncated"])
    with pytest.raises(DamagedProfileError, match="saved") as raised:
        store.save(profile_of(rows=[2]))
    aside = path.with_name(path.name + ".damaged-1")
    assert str(aside) in raised.value.hint
    assert aside.read_bytes() == content
    assert load(store, profile_of()) == profile_of(rows=[2])


def test_save_onto_the_profile_of_another_question_merges_nothing(store: Store, profile_of: ProfileOf) -> None:
    mine, other = profile_of(BASE, rows=[1]), profile_of(Regime(**{**BASE.model_dump(), "seed": 5}), rows=[2])
    path = path_of(store, mine)
    path.parent.mkdir(parents=True)
    path.write_text(other.model_dump_json())
    with pytest.raises(DamagedProfileError, match="seed"):
        store.save(mine)
    assert load(store, mine) == mine
    assert Profile.model_validate_json(path.with_name(path.name + ".damaged-1").read_bytes()) == other


def test_reader_leaves_a_file_that_a_writer_has_mended_meanwhile(
    store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = damage(store, profile_of(), DAMAGE["truncated"])
    parse, seen = store_module.read_profile, []

    def mended_after_the_first_look(asked: Path) -> Profile:
        try:
            return parse(asked)
        finally:
            if not seen:
                seen.append(asked)
                path.write_text(profile_of().model_dump_json())

    monkeypatch.setattr(store_module, "read_profile", mended_after_the_first_look)
    assert load(store, profile_of()) == profile_of()
    assert files(store) == {path}


def test_damaged_file_that_cannot_be_moved_is_still_reported_as_damaged(
    store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = damage(store, profile_of(), DAMAGE["truncated"])

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refused)
    monkeypatch.setattr(store_module.tempfile, "TemporaryFile", refused)
    with pytest.raises(DamagedProfileError, match=r"could not be moved aside.*Read-only"):
        load(store, profile_of())
    assert path.read_bytes() == content


def test_damaged_file_elsewhere_is_reported_and_stays(store: Store, tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text("mine")
    with pytest.raises(DamagedProfileError, match=r"notes\.json is no profile"):
        store.read(notes)
    assert notes.read_text() == "mine"


def test_reading_a_file_that_is_not_there_is_a_usage_error(store: Store) -> None:
    with pytest.raises(UsageError, match="no profile") as raised:
        store.read(store.root / "nothing.json")
    assert raised.value.exit_code == 2


def test_list_reports_damaged_and_newer_files_between_the_others_and_moves_none(
    store: Store, profile_of: ProfileOf
) -> None:
    regimes = [Regime(**{**BASE.model_dump(), "ep_size": size}) for size in (1, 2, 4)]
    broken, _ = damage(store, profile_of(regimes[0]), DAMAGE["binary"])
    later, _ = damage(store, profile_of(regimes[1]), newer)
    good = store.save(profile_of(regimes[2]))
    before = files(store)
    entries = dict(store.profiles())
    assert list(entries) == sorted(entries)
    assert entries[path_of(store, good)] == good
    assert isinstance(entries[broken], DamagedProfileError)
    assert isinstance(entries[later], NewerSchemaError)
    assert files(store) == before == entries.keys()


def test_miss_beside_damaged_files_still_names_the_nearest(store: Store, profile_of: ProfileOf) -> None:
    damage(store, profile_of(Regime(**{**BASE.model_dump(), "seed": 1})), DAMAGE["binary"])
    store.save(profile_of(Regime(**{**BASE.model_dump(), "draws": 5})))
    with pytest.raises(MissError) as raised:
        load(store, profile_of(BASE))
    assert differing_of(raised.value) == {"draws": (16, 5)}


def test_folder_in_a_profiles_place_is_an_error_of_the_store(store: Store, profile_of: ProfileOf) -> None:
    path_of(store, profile_of()).mkdir(parents=True)
    for attempt in (load, Store.save):
        with pytest.raises(StoreError, match="cannot be read"):
            attempt(store, profile_of())
    assert all(isinstance(entry, MoetuneError) for _, entry in store.profiles())
