from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stored import DAMAGE, ProfileOf, damage, files, load, newer, path_of

from moetune.store.merge import Merged, Skipped, merge
from moetune.store.profile import Choice
from moetune.store.store import Store

EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


def content(store: Store) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files(store)}


@pytest.mark.parametrize("apply", [False, True])
def test_buckets_are_merged_by_the_rule_of_saves_and_named(
    store: Store, other: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice], apply: bool
) -> None:
    store.save(profile_of(choices=tuple(choice_of(rows, measured_at=at) for rows, at in
                                        ((1, LATE), (2, EARLY), (4, EARLY), (8, EARLY)))))  # fmt: skip
    theirs = profile_of(
        choices=tuple(
            choice_of(rows, measured_at=at, tactic={"tile": tile})
            for rows, at, tile in ((1, EARLY, 91), (2, LATE, 92), (4, EARLY, 94), (8, EARLY, 8), (16, EARLY, 96))
        )
    )
    other.save(theirs)
    before, others = content(store), content(other)
    (found,) = merge(store, other.root, apply=apply)
    assert found == Merged(path_of(other, theirs), path_of(store, theirs), new=(16,), replaced=(2, 4), kept=(1,))
    assert content(other) == others
    if apply:
        assert [choice.tactic["tile"] for choice in load(store, theirs).choices] == [1, 92, 94, 8, 96]
        (again,) = merge(store, other.root, apply=True)
        assert isinstance(again, Merged)
        assert (again.changes, again.kept) == (False, (1,))
    else:
        assert content(store) == before


def test_a_new_profile_is_taken_and_a_dry_run_makes_no_folder(
    store: Store, other: Store, profile_of: ProfileOf
) -> None:
    other.save(profile_of())
    (found,) = merge(store, other.root, apply=False)
    assert isinstance(found, Merged)
    assert found.new == (1, 2, 4, 8, 16)
    assert not store.root.exists()
    assert list(merge(store, other.root, apply=True)) == [found]
    assert load(store, profile_of()) == profile_of()
    assert content(store).values().__len__() == 1


@pytest.mark.parametrize("change", [DAMAGE["truncated"], newer], ids=["damaged", "newer"])
def test_what_cannot_be_read_is_skipped_and_stays_on_both_sides(
    store: Store, other: Store, profile_of: ProfileOf, change: Callable[[bytes], bytes]
) -> None:
    path, bad = damage(other, profile_of(), change)
    (skipped,) = merge(store, other.root, apply=True)
    assert isinstance(skipped, Skipped)
    assert skipped.path == path
    assert skipped.reason
    assert path.read_bytes() == bad
    assert not store.root.exists()


def test_a_damaged_file_of_the_store_is_moved_aside_only_when_applied(
    store: Store, other: Store, profile_of: ProfileOf
) -> None:
    other.save(profile_of())
    path, bad = damage(store, profile_of(), DAMAGE["truncated"])
    (found,) = merge(store, other.root, apply=False)
    assert isinstance(found, Merged)
    assert "moved aside" in found.note
    assert path.read_bytes() == bad
    list(merge(store, other.root, apply=True))
    assert load(store, profile_of()) == profile_of()
    assert path.with_name(f"{path.name}.damaged-1").read_bytes() == bad


def test_a_newer_file_of_the_store_stays(store: Store, other: Store, profile_of: ProfileOf) -> None:
    other.save(profile_of())
    path, bad = damage(store, profile_of(), newer)
    (found,) = merge(store, other.root, apply=True)
    assert isinstance(found, Skipped)
    assert path.read_bytes() == bad
