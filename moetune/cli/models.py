"""Defines the command `moetune models`."""

from __future__ import annotations

import click

from moetune.cli.help import Command
from moetune.cli.options import json_option
from moetune.cli.output import document, on_terminal, show

SCHEMA_VERSION = 1


@click.command(cls=Command, example="moetune models")
@json_option
def models(as_json: bool) -> None:
    """List the layers that moetune knows by name.

    In a pipe and with --json, each has the address of the config that its values come from.
    """
    from rich.text import Text

    from moetune.inputs import presets
    from moetune.report.lists import models_table

    known = [(presets.layer(name), presets.source(name)) for name in presets.names()]
    if as_json:
        entries = [
            {"layer": layer.model_dump(mode="json"), "source": {"url": source.url, "fields": dict(source.fields)}}
            for layer, source in known
        ]
        document({"schema_version": SCHEMA_VERSION, "models": entries})
    else:
        sources = [(layer, source.url) for layer, source in known]
        addresses = not on_terminal()
        show(models_table(sources, addresses=addresses))
        if not addresses:
            links = "The names are links to the configs; `moetune models | cat` prints the addresses."
            show("", Text(links, style="dim"))
