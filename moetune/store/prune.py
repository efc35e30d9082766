"""Finds the profiles of a store that newer ones of the same question have replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moetune.store.profile import Profile
from moetune.store.store import JOURNAL_SUFFIX, Store
from moetune.store.verify import State, Verified
from moetune.store.versions import KERNEL_FIELDS


@dataclass(frozen=True, slots=True)
class Replaced:
    """A profile that this machine no longer needs.

    Attributes:
        path: its file.
        profile: the profile.
        by: the file of the profile that answers its question here, with at least its buckets.
    """

    path: Path
    profile: Profile
    by: Path


def replaced(store: Store, files: Iterable[Verified]) -> Iterator[Replaced]:
    """Yields the profiles of other versions that one of exactly this machine's versions has replaced.

    Both lie in the folder that is written, are of the same layer, deployment, backend, options and device, and the
    newer one has every bucket of the older one. What cannot be read, is of another device, or has a journal of an
    unfinished tune beside it is never among them.

    Args:
        store: the store.
        files: what `verify` has found in it.
    """
    own = [file for file in files if file.path.is_relative_to(store.root) and file.profile is not None]
    exact = {
        _question(file.profile): file
        for file in own
        if file.profile is not None and file.state == State.MATCHES and not file.differences
    }
    for file in own:
        if file.profile is None or file.state not in (State.MATCHES, State.NEAR, State.OTHER_VERSIONS):
            continue
        newer = exact.get(_question(file.profile))
        if newer is None or newer.profile is None or newer.path == file.path:
            continue
        if file.path.with_suffix(JOURNAL_SUFFIX).exists():
            continue
        if file.profile.rows <= newer.profile.rows:
            yield Replaced(file.path, file.profile, newer.path)


def _question(profile: Profile) -> str:
    """Returns what two profiles have in common that differ in the machine's versions only."""
    strict = profile.environment.strict
    options = sorted((field, value) for field, value in strict.items() if field in KERNEL_FIELDS)
    return repr((profile.layer.digest, profile.regime.digest, profile.backend, profile.environment.device, options))
