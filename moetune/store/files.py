"""Files that are replaced as a whole: after a crash each has its old content or its new one."""

from __future__ import annotations

import os
import secrets
from itertools import count
from pathlib import Path


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
