"""Writes exported files. Replaces a file of an engine that has other content only with `force`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from moetune.errors import UsageError
from moetune.quoting import enumerated, quoted
from moetune.store.files import replace
from moetune.untrusted import read_bytes

MOST_COMPARED: Final = 67_108_864
"""The largest file whose content is compared, in bytes; a larger one is another."""

State = Literal["written", "unchanged"]


def write(files: Mapping[str, str], folder: Path, *, force: bool = False) -> dict[Path, State]:
    """Writes files below `folder`, and creates the folder if it is missing.

    All paths are checked before the first file is written. A reader sees a file's old content or its new one. What
    moetune adds for people, the README and the provenance, is replaced by what belongs to the engine's file.

    Args:
        files: relative POSIX path → text.
        folder: the output folder.
        force: replace files that have other content.

    Returns:
        Each path with its state, `written` or `unchanged`.

    Raises:
        UsageError: a file with other content exists and `force` was not given, or the folder cannot be written.
    """
    for name in files:
        _require_inside(name)
    try:
        present = {path: _held(path) for path in (folder / name for name in files)}
        texts = {folder / name: text.encode() for name, text in files.items()}
        others = [path for path, content in present.items() if content not in (None, texts[path])]
        others = [path for path in others if not _is_added(path)]
        if others and not force:
            raise UsageError(
                f"{enumerated(others)} exists with other content. Nothing was written.",
                "Give another --out, or --force to replace it.",
            )
        for path, content in texts.items():
            if present[path] != content:
                replace(path, content)
    except OSError as error:
        where = error.filename or folder
        raise UsageError(f"{where} cannot be written: {error.strerror or error}.", "Give another --out.") from None
    return {path: "unchanged" if present[path] == content else "written" for path, content in texts.items()}


def _is_added(path: Path) -> bool:
    """Returns whether no engine reads a file: it is the README or the provenance that `base.bundle` adds."""
    return path.name.endswith(".moetune.json") or (path.name.startswith("README.") and path.suffix == ".md")


def _require_inside(name: str) -> None:
    """Raises UsageError if a file's name, which has parts of the profile, leads out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise UsageError(
            f"The file {quoted(name)} would not lie in the output folder. Nothing was written.",
            "Correct the profile's device or versions; moetune did not write them so.",
        )


def _held(path: Path) -> bytes | None:
    try:
        return read_bytes(path, MOST_COMPARED)
    except FileNotFoundError:
        return None
