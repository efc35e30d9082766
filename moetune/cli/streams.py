"""Keeps a command running whose standard streams are closed or full, and keeps what others print out of the result."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

_failures: list[OSError] = []
"""The errors of writing to stdout."""


class _Noting(io.FileIO):
    """A file that notes the error of a write, so that it can be told from the errors of other files."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # None if it would block
        try:
            return super().write(data)
        except OSError as error:
            _failures.append(error)
            raise


class _Dropping(io.FileIO):
    """A file that drops what it cannot write. Progress and notes are lost then, the result is not."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # None if it would block
        try:
            return super().write(data)
        except OSError:
            return len(data)


def repair() -> None:
    """Gives each closed standard stream the null device, and lets stderr drop what it cannot write.

    If a descriptor stayed closed, the next opened file would get its number, and so what is written to that stream.
    A character that a stream cannot encode is written as an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
    sys.stdout = _text(_Noting(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Dropping(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, old: TextIO | None) -> io.TextIOWrapper:
    is_line_buffered = raw.fileno() == 2 or raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=old.encoding if old else "utf-8",
        errors="backslashreplace",
        line_buffering=is_line_buffered,
    )


def failure_of_stdout() -> OSError | None:
    """Returns the first error of writing to stdout, or None."""
    return _failures[0] if _failures else None


def discard_stdout() -> None:
    """Points stdout at the null device: the interpreter flushes it once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Sends to stderr what any code inside prints to stdout, in Python or in C. stdout is for the result alone."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # in a process that has no stdout
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        import ctypes

        ctypes.CDLL(None).fflush(None)  # what C code has printed and not written yet
        os.dup2(kept, 1)
        os.close(kept)
