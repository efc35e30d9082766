"""Files that are replaced as a whole, so that after a crash each has its old content or its new one; and appending."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
BLOCK = 4096
"""How many bytes are read at once to find the end of the last whole line."""


def replace(path: Path, content: bytes) -> None:
    """Writes a file durably: a temporary file, fsync, rename, fsync of the folder. Missing folders are made.

    A file that is replaced keeps its mode, and its owner and group as far as the system permits.
    """
    with _written_beside(path, content) as temporary:
        temporary.replace(path)
    _sync_folder(path.parent)


def probe(path: Path, size: int) -> None:
    """Checks that a file of `size` bytes can be written and synced in the folder of `path`. Leaves only the folder."""
    with _written_beside(path, bytes(size)):
        pass


def sweep(folder: Path) -> None:
    """Deletes the temporary files of writers that were killed. Needs the store's lock.

    A writer holds a lock on its temporary file as long as it lives, so that of a living one stays.
    """
    for temporary in temporaries(folder):
        with suppress(OSError):
            descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(descriptor)


def temporaries(folder: Path) -> list[Path]:
    """Returns the temporary files of writers in a folder, which may be missing."""
    try:
        entries = list(folder.iterdir())
    except OSError:
        return []
    return [
        entry for entry in entries if _TEMPORARY.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink()
    ]


@contextmanager
def _written_beside(path: Path, content: bytes) -> Iterator[Path]:
    """Writes and syncs a temporary file in the folder of `path`, locked. It is deleted at the end if still there."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _keep_owner(descriptor, path)
        write_all(descriptor, content)
        os.fsync(descriptor)
        yield temporary
    finally:
        os.close(descriptor)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _keep_owner(descriptor: int, path: Path) -> None:
    """Gives a file the mode, the group and the owner of the one at `path`, if there is one.

    Only a privileged process may keep another owner, and a group needs a member of it. If the group cannot be kept,
    the new one gets no more rights than everybody has.
    """
    try:
        old = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    new, mode = os.fstat(descriptor), old.st_mode & 0o777
    if new.st_gid != old.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except OSError:
            mode = mode & 0o707 | (mode & 0o007) << 3
    if new.st_uid != old.st_uid:
        with suppress(OSError):
            os.fchown(descriptor, old.st_uid, -1)
    with suppress(OSError):
        os.fchmod(descriptor, mode)


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


def remove(path: Path) -> None:
    """Deletes a file durably."""
    path.unlink()
    _sync_folder(path.parent)


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
