"""`Journal`: what a tune has measured, on disk before the bucket that it is measured for has its choice.

JSON lines beside the profile's file, one a tactic of a measured batch. Writers append whole lines under the store's
lock. A line that a crash has torn is cut off by the next writer, and no reader needs it.
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
    """A tactic was timed, or failed.

    `time_us` is the mean over `rounds` rounds; None of a tactic that failed, and then `reason` says why. Times of two
    sittings must not be compared to the percent: clocks drift. `measured_at` is ISO 8601, UTC.
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
            raise UsageError("A measurement has either a time or the reason why there is none.")
        return self


@dataclass(frozen=True, slots=True)
class Past:
    """What an interrupted run knew of one bucket. `times_us`: of those that ran; `failed`: why others did not."""

    times_us: Mapping[Tactic, float]
    failed: Mapping[Tactic, str]

    def best(self, count: int) -> tuple[Tactic, ...]:
        """The fastest, in order."""
        return tuple(sorted(self.times_us, key=lambda tactic: self.times_us[tactic])[:count])


@dataclass(frozen=True, slots=True)
class Journaled:
    """All that a journal says. `unread`: the lines that are no measurement this moetune knows, each with the reason."""

    measurements: tuple[Measurement, ...] = ()
    unread: tuple[str, ...] = ()

    def of(self, rows: int, default: Tactic) -> Past:
        """What is known of one bucket; nothing where its default failed, for then the machine may be to blame."""
        mine = [measurement for measurement in self.measurements if measurement.rows == rows]
        failed = {measurement.tactic: measurement.reason for measurement in mine if measurement.reason}
        if default in failed:
            return Past({}, {})
        times_us = {m.tactic: m.time_us for m in mine if m.time_us is not None and m.tactic not in failed}
        return Past(times_us, failed)


class Journal:
    """The journal beside one profile. Safe for many writers; what it is about, its place says.

    Args:
        path: its file, which need not exist.
        lock: gives the store's lock.
    """

    def __init__(self, path: Path, lock: Callable[[], AbstractContextManager[None]]) -> None:
        self.path, self._lock = path, lock

    def note(
        self, rows: int, strategy: str, rounds: int, times_us: Mapping[Tactic, float], failed: Mapping[Tactic, str]
    ) -> None:
        """Appends a batch of one bucket: mean times in µs over `rounds` rounds, and the reasons of those that failed.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock cannot be had, or the disk is full.
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
        """What the journal says; nothing where there is none. A torn last line is ignored, others are named.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return Journaled()
        except OSError as error:
            raise StoreError(f"The journal {self.path} cannot be read: {error.strerror or error}.") from None
        measurements, unread = [], []
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                measurements.append(parsed(line, Measurement, SCHEMA_VERSION, f"{self.path}, line {number},"))
            except (DamagedProfileError, NewerSchemaError) as error:
                unread.append(error.message)
        return Journaled(tuple(measurements), tuple(unread))

    def remove(self) -> None:
        """Ends the journal: every bucket has its choice, or none of it is wanted.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock cannot be had.
        """
        if self.path.exists():
            with self._lock():
                self.path.unlink(missing_ok=True)


def _cut_torn_line(file: IO[bytes]) -> None:
    """Makes a file end with a whole line, or empty: what a crash has left of another is of no use."""
    file.seek(0)
    content = file.read()
    if not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
