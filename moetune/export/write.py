"""Writes an `Export`: each file as a whole, and none over another one's content unless that is asked for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from moetune.errors import UsageError

State = Literal["written", "unchanged"]


def write(files: Mapping[str, str], folder: Path, *, force: bool = False) -> dict[Path, State]:
    """Writes files below `folder`, which is made where it is missing.

    All paths are looked at before the first is written. A file is replaced by a rename, so that a reader sees its old
    content or its new one.

    Args:
        files: relative POSIX path → text.
        folder: the output folder.
        force: replaces files of other content.

    Returns:
        Each path, and whether it was written or held this text already.

    Raises:
        UsageError: files of other content are there and `force` was not given, or the folder cannot be written.
    """
    try:
        present = {path: _held(path) for path in (folder / name for name in files)}
        texts = {folder / name: text.encode() for name, text in files.items()}
        others = [path for path, content in present.items() if content is not None and content != texts[path]]
        if others and not force:
            raise UsageError(
                f"{', '.join(map(str, others))}: there already, with another content. Nothing was written.",
                "Give another --out, or --force to replace.",
            )
        for path, content in texts.items():
            if present[path] != content:
                _replace(path, content)
    except OSError as error:
        where = error.filename or folder
        raise UsageError(f"{where} cannot be written: {error.strerror or error}.", "Give another --out.") from None
    return {path: "unchanged" if present[path] == content else "written" for path, content in texts.items()}


def _held(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
