"""`Journal`: the measurements of a tune, saved on disk before their bucket has a choice.

A journal is a file beside the profile's file, with one JSON line for each tactic of a measured batch. Writers append
whole lines under the store's lock. A crash can leave an incomplete last line: readers ignore it, and the next writer
removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final, Literal, Self

from pydantic import model_validator

from moetune.errors import DamagedProfileError, NewerSchemaError, StoreError, UsageError
from moetune.spec.model import FrozenModel
from moetune.spec.tactic import Tactic
from moetune.store.files import make_folder
from moetune.store.profile import Finite
from moetune.store.reading import parsed

SCHEMA_VERSION: Final = 1


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


@dataclass(frozen=True, slots=True)
class Past:
    """The measurements of an interrupted run for one bucket.

    Attributes:
        times_us: the mean times, in µs, of the tactics that ran.
        failed: the reasons of the tactics that failed.
    """

    times_us: Mapping[Tactic, float]
    failed: Mapping[Tactic, str]

    def best(self, count: int) -> tuple[Tactic, ...]:
        """Returns the `count` fastest tactics, the fastest first."""
        return tuple(sorted(self.times_us, key=lambda tactic: self.times_us[tactic])[:count])


@dataclass(frozen=True, slots=True)
class Journaled:
    """The content of a journal. `unread` has an error message for each line that this moetune cannot read."""

    measurements: tuple[Measurement, ...] = ()
    unread: tuple[str, ...] = ()

    def of(self, rows: int, default: Tactic) -> Past:
        """Returns the measurements of one bucket, or none if its default failed: the machine may then be the cause."""
        mine = [measurement for measurement in self.measurements if measurement.rows == rows]
        failed = {measurement.tactic: measurement.reason for measurement in mine if measurement.reason}
        if default in failed:
            return Past({}, {})
        times_us = {m.tactic: m.time_us for m in mine if m.time_us is not None and m.tactic not in failed}
        return Past(times_us, failed)


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
        lines = "".join(f"{measurement.model_dump_json()}\n" for measurement in (*timed, *others))
        if not lines:
            return
        with self._lock():
            make_folder(self.path.parent)
            with self.path.open("ab+") as file:
                _cut_torn_line(file)
                file.write(lines.encode())

    def read(self) -> Journaled:
        """Returns the content of the journal, empty if there is no file. An incomplete last line is ignored.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return Journaled()
        except OSError as error:
            raise StoreError(
                f"The journal {self.path} cannot be read: {error.strerror or error}.",
                "Make it readable, or delete it to measure its buckets again.",
            ) from None
        measurements, unread = [], []
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                measurements.append(parsed(line, Measurement, SCHEMA_VERSION, f"{self.path}, line {number},"))
            except (DamagedProfileError, NewerSchemaError) as error:
                unread.append(error.message)
        return Journaled(tuple(measurements), tuple(unread))

    def remove(self) -> None:
        """Deletes the journal's file, when every bucket has its choice or its measurements are not wanted.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock is not available.
        """
        if self.path.exists():
            with self._lock():
                self.path.unlink(missing_ok=True)


def _cut_torn_line(file: IO[bytes]) -> None:
    """Removes an incomplete last line, which a crash can leave."""
    file.seek(0)
    content = file.read()
    if not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
