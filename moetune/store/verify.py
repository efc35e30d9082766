"""Explains what each file of a store is to a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from moetune.errors import DamagedProfileError, Difference, NewerSchemaError, StoreError
from moetune.spec.environment import Environment
from moetune.store.key import Key
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.store.versions import KERNEL_FIELDS, versions_of


class State(StrEnum):
    """What a file of a store is to a machine."""

    MATCHES = "matches"
    NEAR = "near"
    OTHER_VERSIONS = "other versions"
    OTHER_DEVICE = "other device"
    UNKNOWN = "not known"
    MISPLACED = "misplaced"
    NEWER = "newer schema"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"


BROKEN = frozenset({State.DAMAGED, State.UNREADABLE})
"""The states of files that hold no profile."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What one file is to a machine, and why.

    Attributes:
        path: the file.
        state: what it is.
        why: the reason, empty if the profile matches in every field.
        profile: the profile, or None if the file cannot be read.
        differences: the fields of the environment in which the profile differs from the machine.
    """

    path: Path
    state: State
    why: str = ""
    profile: Profile | None = None
    differences: tuple[Difference, ...] = ()


def verify(store: Store, here: Callable[[Profile], Environment | str]) -> Iterator[Verified]:
    """Yields what each profile file of the stores is to a machine. Moves and writes nothing.

    Args:
        store: the store.
        here: returns the machine's environment for a profile's backend, or why it is not known.
    """
    for path, entry in store.profiles():
        if isinstance(entry, Profile):
            root = next(root for root in store.roots if path.is_relative_to(root))
            yield _of_profile(path, entry, root, here(entry))
        else:
            yield Verified(path, _of_error(entry), entry.message.rstrip("."))


def _of_error(error: StoreError) -> State:
    match error:
        case DamagedProfileError():
            return State.DAMAGED
        case NewerSchemaError():
            return State.NEWER
        case _:
            return State.UNREADABLE


def _of_profile(path: Path, profile: Profile, root: Path, here: Environment | str) -> Verified:
    if path != (wanted := root / Key.of(profile).path):
        return Verified(path, State.MISPLACED, f"no look-up finds it: it belongs to {wanted}", profile)
    if isinstance(here, str):
        return Verified(path, State.UNKNOWN, here, profile)
    differences = tuple(
        Difference(field, wanted, stored)
        for field, (wanted, stored) in here.differing(profile.environment).items()
        if field not in KERNEL_FIELDS
    )
    fields = frozenset(each.field for each in differences)
    versions = versions_of(profile.backend)
    if profile.environment.device != here.device:
        state, named = State.OTHER_DEVICE, tuple(each for each in differences if each.field == "device")
    elif not versions.are_near(fields):
        state, named = State.OTHER_VERSIONS, tuple(each for each in differences if each.field not in versions.neutral)
    elif fields <= versions.neutral:
        state, named = State.MATCHES, differences
    else:
        state, named = State.NEAR, tuple(each for each in differences if each.field not in versions.neutral)
    return Verified(path, state, "; ".join(map(_said, named)), profile, differences)


def _said(difference: Difference) -> str:
    here = "none" if difference.wanted is None else difference.wanted
    stored = "none" if difference.stored is None else difference.stored
    return f"{difference.field} {stored}, here {here}"
