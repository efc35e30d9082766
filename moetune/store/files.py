"""Files that are replaced as a whole, so that after a crash each has its old content or its new one; and appending."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from itertools import count
from pathlib import Path

BLOCK = 4096
"""How many bytes are read at once to find the end of the last whole line."""


def replace(path: Path, content: bytes) -> None:
    """Writes a file durably: a temporary file, fsync, rename, fsync of the folder. Missing folders are made."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def append(path: Path, lines: bytes) -> None:
    """Appends whole lines to a file, all or none. An incomplete last line, which a crash can leave, is removed first.

    Missing folders are made. Needs the store's lock.

    Args:
        path: the file. It need not exist.
        lines: the lines, each with its line feed.
    """
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        whole = _whole_lines(descriptor)
        os.ftruncate(descriptor, whole)
        try:
            write_all(descriptor, lines)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, whole)
            raise
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Writes all of `content`. One call of the system may write less, such as on a disk that becomes full."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _whole_lines(descriptor: int) -> int:
    """Returns how many bytes the whole lines of a file have, reading from its end."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def move_aside(path: Path) -> Path:
    """Renames a damaged file to the first free `<name>.damaged-<n>` and returns it. Needs the store's lock."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    _sync_folder(path.parent)
    return aside


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents durably, if they are missing."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
