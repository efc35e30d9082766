"""Defines the command `moetune export`."""

from __future__ import annotations

from pathlib import Path

import click

from moetune.cli.help import Command, profile_argument
from moetune.cli.options import Request, device_name_option, json_option, near_option, store_option, takes_request
from moetune.errors import UsageError

SCHEMA_VERSION = 1
EXAMPLE = """\
moetune export --model qwen3-235b-a22b --ep 8
  --dispatch vllm:allgather_reducescatter --to vllm --out tuned"""


@click.command(cls=Command, example=EXAMPLE)
@profile_argument
@takes_request(required=False)
@click.option("--to", "target", metavar="ENGINE", help="The engine: vllm, sglang, flashinfer or trtllm.  [required]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The output folder.  [required]")
@click.option(
    "--for-version",
    metavar="V",
    help="The version of the engine, or of FlashInfer, that will read the files. With options, vLLM's also decides "
    "which kernel's profile is looked up.  [default: the newest known]",
)
@click.option("--force", is_flag=True, help="Replace files that have other content.")
@store_option
@near_option
@device_name_option
@json_option
def export(
    path: Path | None,
    request: Request | None,
    target: str | None,
    out: Path | None,
    for_version: str | None,
    force: bool,
    store: Path | None,
    near: bool,
    device_name: str | None,
    as_json: bool,
) -> None:
    """Write a stored profile as the files that an engine reads: the file PROFILE, or the one that answers the options.

    The files go into a folder named after the regime, with a README and their provenance. Warnings name the cases in
    which the engine does not read them, or has another load than the one measured.
    """
    from moetune.cli.stored import on_device, stored_profile
    from moetune.cli.written import say, write_for

    missing = [flag for flag, value in (("--to ENGINE", target), ("--out DIR", out)) if value is None]
    missing += ["and a profile's path, --model or --launch"] if path is None and request is None else []
    if target is None or out is None:
        raise UsageError(f"`moetune export` needs {', '.join(missing)}.", f"Example: {' '.join(EXAMPLE.split())}")
    of_vllm = for_version if target == "vllm" and path is None else None
    request = on_device(request, device_name)
    found = stored_profile("export", path, request, store, near, of_vllm)
    launch = request.launch if request else None
    written = write_for(target, found, out, for_version=for_version, force=force, launch=launch)
    if as_json:
        from moetune.cli.output import document

        differing = {"near": found.near, "neutral": found.neutral, "measured_ladder": found.measured_ladder}
        document({"schema_version": SCHEMA_VERSION, "profile": str(found.path), **differing, **written.document()})
    else:
        say(written)
