"""`moetune models`."""

from __future__ import annotations

import click

from moetune.cli.options import json_option
from moetune.cli.output import document, show

SCHEMA_VERSION = 1


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the layers that moetune knows by name."""
    from moetune.report.tables import models_table
    from moetune.spec import presets

    known = [(presets.layer(name), presets.source(name)) for name in presets.names()]
    if as_json:
        entries = [
            {"layer": layer.model_dump(mode="json"), "source": {"url": source.url, "fields": dict(source.fields)}}
            for layer, source in known
        ]
        document({"schema_version": SCHEMA_VERSION, "models": entries})
    else:
        show(models_table((layer, source.url) for layer, source in known))
