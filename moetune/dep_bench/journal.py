"""`PointJournal`, a file of finished points, so that a dep-bench that was stopped goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from moetune.dep_bench.result import Point
from moetune.errors import StoreError, UsageError
from moetune.spec.model import FrozenModel
from moetune.store.files import append
from moetune.untrusted import read_bytes

MOST_BYTES: Final = 33_554_432
"""The largest journal. A point takes about 3 kB."""


class Line(FrozenModel):
    """One line of the journal. `key` is a digest of all that the point depends on."""

    key: str
    point: Point


class PointJournal:
    """The finished points in a file of JSON lines. Lines of other questions, and incomplete ones, are left alone.

    Args:
        path: the file, which need not exist; None keeps nothing.

    Raises:
        StoreError: the file cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._points: dict[str, Point] = {}
        if path is None:
            return
        try:
            content = read_bytes(path, MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"The journal {path} cannot be read: {error.strerror or error}.") from None
        for text in content.splitlines():
            try:
                line = Line.model_validate_json(text)
            except (UsageError, ValidationError):  # of another version, or cut off
                continue
            self._points[line.key] = line.point

    def find(self, key: str) -> Point | None:
        """Returns the point of a key, or None."""
        return self._points.get(key)

    def add(self, key: str, point: Point) -> None:
        """Appends a point.

        Raises:
            StoreError: the file cannot be written.
        """
        self._points[key] = point
        if self._path is None:
            return
        try:
            append(self._path, f"{Line(key=key, point=point).model_dump_json()}\n".encode())
        except OSError as error:
            raise StoreError(f"The journal {self._path} cannot be written: {error.strerror or error}.") from None
