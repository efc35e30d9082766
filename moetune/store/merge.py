"""Merges the profiles of other machines' stores into a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moetune.errors import DamagedProfileError, NewerSchemaError, StoreError
from moetune.store.profile import Profile
from moetune.store.store import Store, read_all


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge does to one profile of the store.

    Attributes:
        source: the file in the other store.
        path: the file in this store.
        new: the buckets that only the other store has.
        replaced: the buckets that both have, and of which the other store's choice is taken.
        kept: the buckets that both have, and of which this store's choice is kept, because it was measured later.
        note: what else happens, such as that a damaged file is moved aside.
    """

    source: Path
    path: Path
    new: tuple[int, ...] = ()
    replaced: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    note: str = ""

    @property
    def changes(self) -> bool:
        """Returns whether the store's file changes."""
        return bool(self.new or self.replaced)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is not merged, and why."""

    path: Path
    reason: str


def merge(store: Store, other: Path, *, apply: bool) -> Iterator[Merged | Skipped]:
    """Yields what merging every profile of another store does, one after the other. The other store stays as it is.

    Of two choices for one bucket the one that was measured later is taken, and on a tie the other store's, as in
    `Store.save`.

    Args:
        store: the store that is written.
        other: the folder of another store.
        apply: write; else nothing is changed.

    Raises:
        UsageError: the store cannot be written.
        StoreError: the lock is not free in time, or the disk is full. What was yielded before is merged.
    """
    for source, entry in read_all(other.glob("*/*/*/*.json")):
        if isinstance(entry, StoreError):
            yield Skipped(source, entry.message.rstrip("."))
            continue
        path = store.path(entry.layer, entry.regime, entry.backend, entry.environment)
        try:
            stored, note = store.merged_into(entry), ""
        except NewerSchemaError as error:
            yield Skipped(source, error.message.rstrip("."))
            continue
        except DamagedProfileError as error:
            stored, note = None, f"{error.message.rstrip('.')}; it is moved aside"
        result = _compared(source, path, stored, entry, note)
        if apply and (result.changes or note):
            try:
                store.save(entry)
            except DamagedProfileError as error:  # all is saved
                result = Merged(source, path, result.new, result.replaced, result.kept, error.message.rstrip("."))
        yield result


def _compared(source: Path, path: Path, stored: Profile | None, other: Profile, note: str) -> Merged:
    before = {} if stored is None else {choice.rows: choice for choice in stored.choices}
    after = {choice.rows: choice for choice in (other if stored is None else stored.merged(other)).choices}
    new = tuple(choice.rows for choice in other.choices if choice.rows not in before)
    differing = [choice for choice in other.choices if before.get(choice.rows, choice) != choice]
    replaced = tuple(choice.rows for choice in differing if after[choice.rows] == choice)
    kept = tuple(choice.rows for choice in differing if after[choice.rows] != choice)
    return Merged(source, path, new, replaced, kept, note)
