"""Defines the command `moetune doctor`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Command
from moetune.cli.options import device_option, json_option
from moetune.cli.output import document, show

if TYPE_CHECKING:
    from moetune.backends.registry import Diagnosis
    from moetune.spec.environment import Environment

SCHEMA_VERSION = 1


@click.command(cls=Command, example="moetune doctor")
@device_option
@json_option
def doctor(device: str | None, as_json: bool) -> None:
    """List the backends that can run here, and what the others need.

    Without torch, the GPU of this machine is not known.
    """
    from moetune.backends import registry
    from moetune.report.lists import backends_table, facts_table

    found = registry.diagnose()
    here = _environment(found, device) if importlib.util.find_spec("torch") else None
    if as_json:
        backends = [diagnosis._asdict() for diagnosis in found]
        environment = None if here is None else here.model_dump(mode="json")
        document({"schema_version": SCHEMA_VERSION, "backends": backends, "environment": environment})
        return
    if here is None:
        facts = {"torch": "not installed, so the GPU is not known: pip install torch"}
    else:
        facts = {"device": here.device, **here.strict, **here.informative}
    show(backends_table(found), "", facts_table(facts.items()))


def _environment(diagnoses: Iterable[Diagnosis], device: str | None) -> Environment:
    """Returns this machine's environment for the first backend that can run here."""
    from moetune.backends import registry
    from moetune.measure import probe

    able = next((diagnosis.name for diagnosis in diagnoses if diagnosis.available), "torch")
    return probe.environment(registry.backend(able), probe.device_for(device))
