"""Writes the result of a command to stdout: one JSON document, or tables and lines."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

    from moetune.errors import MissError

PIPE_COLUMNS = 1000
"""The width if stdout is no terminal, so that no row is folded. The longest row is a profile's file, below 300."""
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
    """Returns a console on stdout, or on stderr. It raises `BrokenPipeError` if the reader has closed the pipe."""
    from rich.console import Console

    class RaisingConsole(Console):
        def on_broken_pipe(self) -> None:
            raise

    stream = sys.stderr if stderr else sys.stdout
    return RaisingConsole(file=stream, width=None if stream.isatty() else PIPE_COLUMNS, highlight=False)


def on_terminal() -> bool:
    """Returns whether stdout is a terminal. There an address is a link, in a pipe a column."""
    return console().is_terminal


def show(*renderables: RenderableType) -> None:
    """Writes renderables to stdout, one below the other.

    Text folds at the terminal's width, between words. Strings and text with `no_wrap` never fold: they hold paths and
    commands, which a reader copies whole.
    """
    from rich.text import Text

    out = console()
    for renderable in renderables:
        whole = isinstance(renderable, str) or (isinstance(renderable, Text) and bool(renderable.no_wrap))
        out.print(renderable, soft_wrap=whole)


@contextmanager
def patience(message: str, seconds: float = 2.0) -> Iterator[None]:
    """Prints `message` on stderr if what runs inside takes longer than `seconds`."""
    timer = threading.Timer(seconds, lambda: click.echo(message, err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
