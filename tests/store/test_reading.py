from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import DAMAGE, ProfileOf, damage, files, load, newer, path_of

from moetune.errors import DamagedProfileError, MissError, MoetuneError, NewerSchemaError, StoreError, UsageError
from moetune.spec.regime import Regime
from moetune.store.profile import SCHEMA_VERSION
from moetune.store.reading import load_profile
from moetune.store.store import Store


def test_file_is_plain_versioned_json(store: Store, profile_of: ProfileOf) -> None:
    store.save(profile_of())
    document = json.loads(path_of(store, profile_of()).read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["regime"]["attention_dp"] is True
    assert document["choices"][0]["tactic"] == {"tile": 1}


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


@settings(max_examples=60)
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


@settings(max_examples=20)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_file_truncated_anywhere_is_moved_aside(kept: float, profile_of: ProfileOf) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        _, content = damage(store, profile_of(), lambda good: good.rstrip()[: int(kept * (len(good) - 1))])
        with pytest.raises(DamagedProfileError):
            load(store, profile_of())
        [aside] = files(store)
        assert aside.read_bytes() == content


def test_profile_of_a_newer_schema_stays_and_is_neither_read_nor_written(store: Store, profile_of: ProfileOf) -> None:
    path, content = damage(store, profile_of(), newer)
    for attempt in (load, Store.save):
        with pytest.raises(NewerSchemaError, match=r"schema_version 2.*Update moetune") as raised:
            attempt(store, profile_of())
        assert str(path) in raised.value.message
        assert raised.value.exit_code == 1
        assert files(store) == {path}
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


def test_folder_in_a_profiles_place_is_an_error_of_the_store(store: Store, profile_of: ProfileOf) -> None:
    path_of(store, profile_of()).mkdir(parents=True)
    for attempt in (load, Store.save):
        with pytest.raises(StoreError, match="cannot be read"):
            attempt(store, profile_of())
    assert all(isinstance(entry, MoetuneError) for _, entry in store.profiles())


def test_load_profile_reads_one_file_or_raises_an_error_of_the_store(profile_of, tmp_path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(StoreError, match="no profile file"):
        load_profile(path)
    path.write_text(profile_of().model_dump_json())
    assert load_profile(str(path)) == profile_of()
    path.write_text("{}")
    with pytest.raises(DamagedProfileError, match="schema_version"):
        load_profile(path)
    assert path.read_text() == "{}"
    with pytest.raises(StoreError, match="cannot be read"):
        load_profile(tmp_path)
