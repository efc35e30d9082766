"""Writes a command of moetune as the reader can run it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

_NAME = "moetune"


def command(*words: str) -> str:
    """Returns `moetune WORDS`, quoted for a shell and with the program as the user typed it.

    >>> command("show", "a b.json")
    "moetune show 'a b.json'"
    """
    return shlex.join([*program(), *words])


def shortest(path: Path | str) -> str:
    """Returns a path relative to the working folder if it lies in it, otherwise as it is."""
    given, here = Path(path), Path.cwd()
    return str(given.relative_to(here)) if given.is_relative_to(here) else str(given)


def program() -> list[str]:
    """Returns the words that start this program.

    They are `moetune` if this is the one on PATH, or if moetune was not started as a program. Otherwise they are what
    was typed: a path such as `.venv/bin/moetune`, or `python -m moetune`.
    """
    started = Path(sys.argv[0] if sys.argv else "")
    if started.name == "__main__.py" and started.parent.name == _NAME:
        return _module_words()
    if started.name != _NAME or not started.is_file():
        return [_NAME]
    found = shutil.which(_NAME)
    return [_NAME] if found and os.path.samefile(found, started) else [sys.argv[0]]


def _module_words() -> list[str]:
    """Returns `python -m moetune` with the interpreter as it was typed."""
    return [sys.orig_argv[0] if sys.orig_argv else "python", "-m", _NAME]
