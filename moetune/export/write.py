"""Writes exported files. Replaces a file that has other content only with `force`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from moetune.errors import UsageError
from moetune.store.files import replace

State = Literal["written", "unchanged"]


def write(files: Mapping[str, str], folder: Path, *, force: bool = False) -> dict[Path, State]:
    """Writes files below `folder`, and creates the folder if it is missing.

    All paths are checked before the first file is written. A reader sees a file's old content or its new one.

    Args:
        files: relative POSIX path → text.
        folder: the output folder.
        force: replace files that have other content.

    Returns:
        Each path with its state, `written` or `unchanged`.

    Raises:
        UsageError: a file with other content exists and `force` was not given, or the folder cannot be written.
    """
    try:
        present = {path: _held(path) for path in (folder / name for name in files)}
        texts = {folder / name: text.encode() for name, text in files.items()}
        others = [path for path, content in present.items() if content is not None and content != texts[path]]
        if others and not force:
            raise UsageError(
                f"{', '.join(map(str, others))} exists with other content. Nothing was written.",
                "Give another --out, or --force to replace it.",
            )
        for path, content in texts.items():
            if present[path] != content:
                replace(path, content)
    except OSError as error:
        where = error.filename or folder
        raise UsageError(f"{where} cannot be written: {error.strerror or error}.", "Give another --out.") from None
    return {path: "unchanged" if present[path] == content else "written" for path, content in texts.items()}


def _held(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
