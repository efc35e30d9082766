"""How a command answers: one JSON document, or rich renderables, on stdout."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

PIPE_COLUMNS = 1000
"""Where stdout is no terminal nothing is folded to its width: the longest row is a profile's file, below 300."""


def document(content: BaseModel | dict[str, Any], **fields: Any) -> None:
    """Writes one versioned JSON document to stdout: `content`, which has its `schema_version`, and `fields`."""
    plain = content if isinstance(content, dict) else json.loads(content.model_dump_json())
    click.echo(json.dumps({**plain, **fields}, indent=2, allow_nan=False))


def console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_COLUMNS, highlight=False)


def on_terminal() -> bool:
    """Whether a person reads stdout. There an address is a link, in a pipe a column."""
    return console().is_terminal


def show(*renderables: RenderableType) -> None:
    """Writes renderables to stdout, one below the other; a line of text is never folded."""
    from rich.text import Text

    out = console()
    for renderable in renderables:
        out.print(renderable, soft_wrap=isinstance(renderable, str | Text))
