from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stored import DAMAGE, ProfileOf, damage, newer, path_of

from moetune.spec.environment import Environment
from moetune.store.profile import Profile
from moetune.store.prune import replaced
from moetune.store.store import Store
from moetune.store.verify import State, Verified, verify

HERE = Environment(
    device="Example GPU 80GB",
    strict={"torch": "2.13.0", "cuda": "13.0", "triton": "3.7", "kernel": "builtin", "kernel_source": "0f"},
)


def of(profile_of: ProfileOf, device: str = HERE.device, **strict: str) -> Profile:
    """A profile by `triton`, measured where `strict` was as given."""
    return profile_of(backend="triton", environment=Environment(device=device, strict={**HERE.strict, **strict}))


def verified(store: Store) -> dict[Path, Verified]:
    return {found.path: found for found in verify(store, lambda profile: HERE)}


@pytest.mark.parametrize(
    ("device", "strict", "state", "why"),
    [
        (HERE.device, {}, State.MATCHES, ""),
        (HERE.device, {"kernel": "sglang"}, State.MATCHES, ""),
        (HERE.device, {"torch": "2.9"}, State.MATCHES, "torch 2.9, here 2.13.0"),
        (HERE.device, {"triton": "3.6", "torch": "2.9"}, State.NEAR, "triton 3.6, here 3.7"),
        (HERE.device, {"compute_capability": "9.0"}, State.OTHER_VERSIONS, "compute_capability 9.0, here none"),
        ("Other GPU", {"triton": "3.6"}, State.OTHER_DEVICE, "device Other GPU, here Example GPU 80GB"),
    ],
)
def test_the_state_of_a_profile_and_why(
    store: Store, profile_of: ProfileOf, device: str, strict: dict[str, str], state: State, why: str
) -> None:
    store.save(of(profile_of, device, **strict))
    ((_, found),) = verified(store).items()
    assert (found.state, found.why) == (state, why)


def test_what_cannot_be_compared_says_why(store: Store, profile_of: ProfileOf) -> None:
    store.save(profile_of())
    (found,) = verify(store, lambda profile: "triton is not installed here")
    assert (found.state, found.why) == (State.UNKNOWN, "triton is not installed here")


def test_a_file_in_the_wrong_place_is_found_by_no_look_up(store: Store, profile_of: ProfileOf) -> None:
    store.save(of(profile_of))
    right = path_of(store, of(profile_of))
    wrong = right.rename(right.with_name("triton-0.json"))
    found = verified(store)[wrong]
    assert found.state == State.MISPLACED
    assert str(right) in found.why


@pytest.mark.parametrize(
    ("change", "state"), [(DAMAGE["truncated"], State.DAMAGED), (newer, State.NEWER)], ids=["damaged", "newer"]
)
def test_a_file_that_is_no_profile_stays(
    store: Store, profile_of: ProfileOf, change: Callable[[bytes], bytes], state: State
) -> None:
    path, bad = damage(store, of(profile_of), change)
    assert verified(store)[path].state == state
    assert path.read_bytes() == bad


def test_a_folder_in_place_of_a_profile_cannot_be_read(store: Store, profile_of: ProfileOf) -> None:
    path = path_of(store, profile_of())
    path.mkdir(parents=True)
    assert verified(store)[path].state in (State.UNREADABLE, State.DAMAGED)


def prunable(store: Store) -> set[Path]:
    return {each.path for each in replaced(store, verified(store).values())}


def test_only_what_this_machines_own_versions_have_replaced_is_pruned(
    store: Store, packaged: Store, profile_of: ProfileOf
) -> None:
    old, older = of(profile_of, triton="3.6"), of(profile_of, compute_capability="8.0")
    for profile in (old, older, of(profile_of, "Other GPU"), of(profile_of, kernel="sglang", triton="3.6")):
        store.save(profile)
    assert not prunable(store), "nothing has replaced them"
    store.save(of(profile_of))
    packaged.save(old)
    damaged = path_of(store, of(profile_of)).with_name("triton-1.json")
    damaged.write_text("{")
    assert prunable(Store(store.root, packaged.root)) == {path_of(store, old), path_of(store, older)}
    path_of(store, old).with_suffix(".journal.jsonl").touch()
    assert prunable(store) == {path_of(store, older)}, "a tune of it has not finished"


def test_a_profile_with_a_bucket_more_than_its_successor_stays(store: Store, profile_of: ProfileOf) -> None:
    old = of(profile_of, triton="3.6")
    store.save(old)
    store.save(of(profile_of).model_copy(update={"choices": old.choices[:-1]}))
    assert not prunable(store)


def test_a_profile_is_deleted_only_if_it_is_still_what_was_found(store: Store, profile_of: ProfileOf) -> None:
    old, successor = of(profile_of, triton="3.6"), of(profile_of)
    store.save(old)
    store.save(successor)
    path, by = path_of(store, old), path_of(store, successor)
    journal = path.with_suffix(".journal.jsonl")
    changed = old.model_copy(update={"choices": old.choices[:1]})
    assert not store.delete(path, changed, by)
    journal.touch()
    assert not store.delete(path, old, by)
    journal.unlink()
    assert not store.delete(path, old, by.with_name("gone.json"))
    assert path.exists()
    assert store.delete(path, old, by)
    assert not path.exists()
    assert not store.delete(path, old, by), "another process was faster"
    assert by.exists()
