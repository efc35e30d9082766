"""`own:shared`: the first store is written, and all are read in their order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import DAMAGE, ProfileOf, damage, load, newer, path_of

from moetune.errors import MissError, UsageError
from moetune.store.profile import Choice
from moetune.store.store import Store

EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


def joined(*stores: Store) -> str:
    return os.pathsep.join(str(store.root) for store in stores)


@pytest.fixture
def shared(tmp_path: Path) -> Store:
    return Store(tmp_path / "shared")


@pytest.fixture
def both(store: Store, shared: Store, packaged: Store) -> Store:
    return Store(joined(store, shared), packaged.root)


def test_the_variable_and_the_library_name_several_folders(
    monkeypatch: pytest.MonkeyPatch, store: Store, shared: Store
) -> None:
    monkeypatch.setenv("MOETUNE_STORE", joined(store, shared, store))
    for made in (Store(), Store(joined(store, shared)), Store(str(Store()))):
        assert (made.root, made.shared) == (store.root, (shared.root,))
        assert made.roots == (store.root, shared.root)


@pytest.mark.parametrize("given", [":a", "a:", "a::b", ":"])
def test_a_folder_without_a_name_is_an_error(given: str) -> None:
    with pytest.raises(UsageError, match="has no name"):
        Store(given)


def test_the_first_store_with_a_profile_answers(
    both: Store, store: Store, shared: Store, packaged: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    answers = [profile_of(choices=(choice_of(1, tactic={"tile": tile}),)) for tile in (93, 92, 91)]
    for place, profile in zip((packaged, shared, store), answers, strict=True):
        place.save(profile)
        assert load(both, profile) == profile
    assert [path for path, _ in both.profiles()] == [path_of(each, answers[0]) for each in (store, shared, packaged)]
    assert [both.is_packaged(path) for path, _ in both.profiles()] == [False, False, True]


def test_only_the_first_is_written_and_takes_the_others_buckets(
    both: Store, store: Store, shared: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    theirs = profile_of(choices=(choice_of(1, measured_at=LATE), choice_of(2, measured_at=EARLY)))
    shared.save(theirs)
    before = path_of(shared, theirs).read_bytes()
    mine = profile_of(choices=(choice_of(2, measured_at=LATE, tactic={"tile": 92}),))
    both.save(mine)
    assert path_of(shared, theirs).read_bytes() == before
    assert [choice.tactic["tile"] for choice in load(store, mine).choices] == [1, 92]
    assert both.journal(mine.layer, mine.regime, mine.backend, mine.environment).path.is_relative_to(store.root)


@pytest.mark.parametrize("change", [DAMAGE["truncated"], newer], ids=["damaged", "newer"])
def test_a_shared_file_that_cannot_be_read_is_logged_and_stays(
    both: Store,
    shared: Store,
    packaged: Store,
    profile_of: ProfileOf,
    change: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, bad = damage(shared, profile_of(), change)
    with pytest.raises(MissError):
        load(both, profile_of())
    assert str(path) in caplog.text
    assert "shared store" in caplog.text
    packaged.save(profile_of())
    assert load(both, profile_of()) == profile_of()
    both.save(profile_of())
    assert path.read_bytes() == bad


def test_a_shared_folder_may_be_missing_or_a_file(store: Store, profile_of: ProfileOf, tmp_path: Path) -> None:
    store.save(profile_of())
    (tmp_path / "file").touch()
    other = Store(f"{tmp_path / 'file'}{os.pathsep}{tmp_path / 'none'}{os.pathsep}{store.root}")
    assert load(other, profile_of()) == profile_of()
    assert not (tmp_path / "none").exists()
