"""`Journal`: the measurements of a tune, saved on disk before their bucket has a choice.

A journal is a file beside the profile's file, with one JSON line for each tactic of a measured batch, and two for each
search: one when it begins and one when it ends. Writers append the lines of a batch at once, under the store's lock.
A crash can leave an incomplete last line: readers ignore it, and the next writer removes it. Once a bucket's choice is
stored, its measurements are dropped. So the journal has those of the buckets that are not finished, and of the others
what later searches begin with.

Lines are not synced to the disk: a process that is killed loses none, a machine that loses its power may lose the last
seconds of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import model_validator

from moetune.errors import DamagedProfileError, NewerSchemaError, StoreError, UsageError
from moetune.spec.model import FrozenModel
from moetune.spec.tactic import Tactic
from moetune.store.files import append, replace, sweep, temporaries
from moetune.store.profile import Finite
from moetune.store.reading import parsed
from moetune.untrusted import read_bytes

SCHEMA_VERSION: Final = 1
MOST_BYTES: Final = 33_554_432
"""The largest journal. One bucket of 4,000 tactics takes some hundred kB."""


class Measurement(FrozenModel):
    """The time or the failure of one tactic.

    Times from different runs must not be compared to the percent, because clock rates drift.

    Attributes:
        rows: the bucket.
        time_us: the mean time over `rounds` rounds in µs, or None if the tactic failed.
        reason: why the tactic failed, or empty.
        strategy: the search strategy.
        measured_at: ISO 8601, UTC.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    rows: int
    tactic: Tactic
    time_us: Finite | None = None
    rounds: int
    reason: str = ""
    strategy: str
    measured_at: str

    @model_validator(mode="after")
    def _timed_or_failed(self) -> Self:
        if (self.time_us is None) != bool(self.reason):
            raise UsageError("A measurement has either a time or the reason why the tactic failed.")
        return self


class Searched(FrozenModel):
    """What the search of one bucket began with, and once it has ended, what it left to the searches after it.

    Attributes:
        rows: the bucket.
        strategy: the search strategy.
        warm_starts: the fast tactics of other buckets that it began with.
        finalists: the tactics that it returned, or None if it has not ended.
        promising: what the next bucket's search gets as warm starts after the finalists.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    rows: int
    strategy: str
    warm_starts: tuple[Tactic, ...]
    finalists: tuple[Tactic, ...] | None = None
    promising: tuple[Tactic, ...] = ()


@dataclass(frozen=True, slots=True)
class Past:
    """What an interrupted run left of one bucket.

    Attributes:
        times_us: the number of rounds and the mean time in µs of each measurement of a tactic, in the order in which
            they were taken.
        failed: the reasons of the tactics that failed.
        search: what the bucket's search began with, or None if that is not known.
    """

    times_us: Mapping[Tactic, Sequence[tuple[int, float]]] = field(default_factory=dict)
    failed: Mapping[Tactic, str] = field(default_factory=dict)
    search: Searched | None = None


@dataclass(frozen=True, slots=True)
class Journaled:
    """The content of a journal.

    Attributes:
        measurements: the measurements, in the order in which they were taken.
        searches: the last line of each bucket's search, in the order in which they began.
        unread: an error message for each line that this moetune cannot read.
    """

    measurements: tuple[Measurement, ...] = ()
    searches: tuple[Searched, ...] = ()
    unread: tuple[str, ...] = ()

    def is_doubted(self, rows: int, default: Tactic) -> bool:
        """Returns whether the default of a bucket has failed, so that nothing that is known of it is believed."""
        return any(each.reason and (each.rows, each.tactic) == (rows, default) for each in self.measurements)

    def of(self, rows: int, default: Tactic, strategy: str) -> Past:
        """Returns what is known of one bucket, or nothing if its default failed: the machine may then be the cause.

        Args:
            rows: the bucket.
            default: its default.
            strategy: the search strategy. What failed under another one failed all the same, but its times are not
                those that this one would ask for.
        """
        if self.is_doubted(rows, default):
            return Past()
        mine = [measurement for measurement in self.measurements if measurement.rows == rows]
        failed = {measurement.tactic: measurement.reason for measurement in mine if measurement.reason}
        times_us: dict[Tactic, list[tuple[int, float]]] = {}
        for measurement in mine:
            if measurement.time_us is not None and measurement.strategy == strategy:
                times_us.setdefault(measurement.tactic, []).append((measurement.rounds, measurement.time_us))
        searches = (each for each in self.searches if (each.rows, each.strategy) == (rows, strategy))
        return Past(times_us, failed, next(searches, None))


class Journal:
    """The journal of one profile. Several processes can write to it.

    Args:
        path: the journal's file, beside the profile's. It need not exist.
        lock: returns the store's lock.
    """

    def __init__(self, path: Path, lock: Callable[[], AbstractContextManager[None]]) -> None:
        self.path, self._lock = path, lock

    def note(
        self, rows: int, strategy: str, rounds: int, times_us: Mapping[Tactic, float], failed: Mapping[Tactic, str]
    ) -> None:
        """Appends a measured batch of one bucket.

        Args:
            rows: the bucket.
            strategy: the search strategy.
            rounds: the number of rounds that each tactic was timed in.
            times_us: the mean time of each tactic that ran, in µs.
            failed: the reason of each tactic that failed.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock is not available, or the disk is full.
        """
        shared: dict[str, Any] = {
            "rows": rows,
            "rounds": rounds,
            "strategy": strategy,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        timed = [Measurement(tactic=tactic, time_us=time_us, **shared) for tactic, time_us in times_us.items()]
        others = [Measurement(tactic=tactic, reason=reason, **shared) for tactic, reason in failed.items()]
        self._append(*timed, *others)

    def note_search(self, search: Searched) -> None:
        """Appends what a search begins with, or has ended with. Raises the errors of `note`."""
        self._append(search)

    def read(self) -> Journaled:
        """Returns the content of the journal, empty if there is no file. An incomplete last line is ignored.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            content = read_bytes(self.path, MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return Journaled()
        except OSError as error:
            raise StoreError(
                f"The journal {self.path} cannot be read: {error.strerror or error}.",
                "Make it readable, or delete it to measure its buckets again.",
            ) from None
        measurements: list[Measurement] = []
        searches: dict[int, Searched] = {}
        unread: list[str] = []
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                found = _parsed(line, f"{self.path}, line {number},")
            except (DamagedProfileError, NewerSchemaError) as error:
                unread.append(error.message)
                continue
            if isinstance(found, Measurement):
                measurements.append(found)
            else:
                searches[found.rows] = found
        return Journaled(tuple(measurements), tuple(searches.values()), tuple(unread))

    def drop(self, buckets: Collection[int]) -> None:
        """Drops the measurements of finished buckets, and keeps what their searches left to later ones.

        Args:
            buckets: the row counts of the buckets whose choices are stored.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock is not available, or the disk is full.
        """
        with self._lock():
            try:
                content = read_bytes(self.path, MOST_BYTES)
            except (FileNotFoundError, NotADirectoryError):
                return
            kept = b"".join(line for line in content.splitlines(keepends=True) if not _is_dropped(line, buckets))
            if kept != content:
                replace(self.path, kept)

    def _append(self, *records: Measurement | Searched) -> None:
        if records:
            lines = "".join(f"{record.model_dump_json()}\n" for record in records)
            with self._lock():
                append(self.path, lines.encode())

    def remove(self) -> None:
        """Deletes the journal's file, when every bucket has its choice or its measurements are not wanted.

        What killed writers have left beside it is deleted, too.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock is not available.
        """
        if self.path.exists() or temporaries(self.path.parent):
            with self._lock():
                self.path.unlink(missing_ok=True)
                sweep(self.path.parent)


def _parsed(line: bytes, name: str) -> Measurement | Searched:
    """Parses one line. Raises the errors of `reading.parsed`."""
    if b'"warm_starts":' in line:
        return parsed(line, Searched, SCHEMA_VERSION, name)
    return parsed(line, Measurement, SCHEMA_VERSION, name)


def _is_dropped(line: bytes, buckets: Collection[int]) -> bool:
    """Returns whether a line is of no use once these buckets are finished. A line that cannot be read is kept."""
    try:
        found = _parsed(line, "")
    except (DamagedProfileError, NewerSchemaError):
        return not line.endswith(b"\n")
    return found.rows in buckets and (isinstance(found, Measurement) or found.finalists is None)
