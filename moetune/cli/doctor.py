"""`moetune doctor`."""

from __future__ import annotations

import click

from moetune.cli.options import json_option
from moetune.cli.output import document, show

SCHEMA_VERSION = 1


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say which backends can run here and, if not, why and what to do."""
    from moetune.backends import registry
    from moetune.measure import probe
    from moetune.report.tables import backends_table, facts_table

    found = registry.diagnose()
    able = next((diagnosis.name for diagnosis in found if diagnosis.available), "torch")
    here = probe.environment(registry.backend(able), probe.device_for(None))
    if as_json:
        backends = [diagnosis._asdict() for diagnosis in found]
        environment = here.model_dump(mode="json")
        document({"schema_version": SCHEMA_VERSION, "backends": backends, "environment": environment})
    else:
        facts = {"device": here.device, **here.strict, **here.informative}
        show(backends_table(found), "", facts_table(facts.items()))
