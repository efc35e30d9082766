"""Defines the command `moetune show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moetune.cli.help import Command, profile_argument
from moetune.cli.options import Request, device_name_option, json_option, near_option, store_option, takes_request
from moetune.cli.output import document
from moetune.cli.output import show as show_all

EXAMPLE = """\
moetune show --model qwen3-235b-a22b --ep 8
  --dispatch vllm:allgather_reducescatter"""


@click.command(cls=Command, example=EXAMPLE)
@profile_argument
@takes_request(required=False)
@store_option
@near_option
@device_name_option
@json_option
def show(
    path: Path | None, request: Request | None, store: Path | None, near: bool, device_name: str | None, as_json: bool
) -> None:
    """Print a stored profile: the file PROFILE, or the one that answers the question given as options.

    Profiles are looked up in the store, then among those packaged with moetune. Nothing is measured. If there is no
    profile, the error says what the nearest one was measured on, and the exit code is 3.
    """
    from moetune.cli.stored import on_device, stored_profile
    from moetune.report.profile import profile_report
    from moetune.store.store import Store

    request = on_device(request, device_name)
    found = stored_profile("show", path, request, store, near)
    packaged = Store(store).is_packaged(found.path)
    state: dict[str, Any] = {"packaged": packaged, "near": found.near, "neutral": found.neutral}
    state["measured_ladder"] = found.measured_ladder
    if as_json:
        document(found.profile, path=str(found.path), **state)
    else:
        show_all(*profile_report(found.profile, found.path, **state, engine=request.engine if request else None))
