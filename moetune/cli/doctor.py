"""Defines the command `moetune doctor`."""

from __future__ import annotations

import click

from moetune.cli.help import Command
from moetune.cli.options import device_option, json_option
from moetune.cli.output import document, show

SCHEMA_VERSION = 1


@click.command(cls=Command, example="moetune doctor")
@device_option
@json_option
def doctor(device: str | None, as_json: bool) -> None:
    """List the backends that can run here, and what the others need."""
    from moetune.backends import registry
    from moetune.measure import probe
    from moetune.report.lists import backends_table, facts_table

    found = registry.diagnose()
    able = next((diagnosis.name for diagnosis in found if diagnosis.available), "torch")
    here = probe.environment(registry.backend(able), probe.device_for(device))
    if as_json:
        backends = [diagnosis._asdict() for diagnosis in found]
        environment = here.model_dump(mode="json")
        document({"schema_version": SCHEMA_VERSION, "backends": backends, "environment": environment})
    else:
        facts = {"device": here.device, **here.strict, **here.informative}
        show(backends_table(found), "", facts_table(facts.items()))
