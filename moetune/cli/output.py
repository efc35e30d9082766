"""Writes the result of a command to stdout: one JSON document, or tables and lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from moetune.quoting import printable

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

    from moetune.errors import MissError

PIPE_COLUMNS = 1000
"""The width if stdout is no terminal and COLUMNS is not set. No row is folded: the longest has less than 300."""
MISS_SCHEMA_VERSION = 1


def document(content: BaseModel | dict[str, Any], **fields: Any) -> None:
    """Writes one versioned JSON document to stdout: `content`, which has its `schema_version`, and `fields`."""
    plain = content if isinstance(content, dict) else json.loads(content.model_dump_json())
    click.echo(json.dumps({**plain, **fields}, indent=2, allow_nan=False))


def miss_document(miss: MissError) -> dict[str, Any]:
    """Returns the JSON document of a miss: the error, the nearest profile, and every field in which it differs."""
    differing = {each.field: each.plain() for each in miss.differences}
    nearest = None if miss.nearest is None else str(miss.nearest)
    fields = {"message": miss.message, "hint": miss.hint, "differing": differing, "nearest": nearest}
    return {"schema_version": MISS_SCHEMA_VERSION, "miss": fields}


def console(*, stderr: bool = False) -> Console:
    """Returns a console on stdout, or on stderr. It raises `BrokenPipeError` if the reader has closed the pipe.

    Names and messages can come from anyone, so no string is read as markup, and what a terminal would obey is escaped.
    """
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

    class RaisingConsole(Console):
        def on_broken_pipe(self) -> None:
            raise

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                plain = segment.control is None and not segment.text.isprintable()
                yield segment._replace(text=printable(segment.text)) if plain else segment

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _columns(PIPE_COLUMNS)
    return RaisingConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _columns(default: int) -> int:
    """Returns the width that the variable COLUMNS gives, or `default`."""
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else default


def on_terminal() -> bool:
    """Returns whether stdout is a terminal. There an address is a link, in a pipe a column."""
    return console().is_terminal


def show(*renderables: RenderableType) -> None:
    """Writes renderables to stdout, one below the other.

    Text folds at the terminal's width, between words. Strings and text with `no_wrap` never fold: they hold paths and
    commands, which a reader copies whole. In a pipe no line ends with blanks.
    """
    from rich.text import Text

    out = console()

    def print_all() -> None:
        for renderable in renderables:
            whole = isinstance(renderable, str) or (isinstance(renderable, Text) and bool(renderable.no_wrap))
            out.print(renderable, soft_wrap=whole)

    if out.is_terminal:
        print_all()
        return
    with out.capture() as captured:
        print_all()
    out.file.write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))


def report(text: str, *, command: str = "") -> None:
    """Writes an error, a warning or a note to stderr. In a terminal it folds at the width, between words.

    Args:
        text: its lines.
        command: a last line that is never folded, because a reader copies it whole.
    """
    lines = printable(text).split("\n")
    if sys.stderr.isatty():
        width = _columns(shutil.get_terminal_size().columns)
        lines = [
            textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")
            for line in lines
        ]
    click.echo("\n".join([*lines, *([printable(command)] if command else [])]), err=True)


def line(text: str, *, err: bool = False) -> None:
    """Writes one line to stdout or stderr, never folded."""
    click.echo(printable(text), err=err)


@contextmanager
def patience(message: str, seconds: float = 2.0) -> Iterator[None]:
    """Prints `message` on stderr if what runs inside takes longer than `seconds`."""
    timer = threading.Timer(seconds, lambda: line(message, err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
