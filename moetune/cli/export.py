"""`moetune export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetune.cli.options import Question, asks, json_option, store_option

if TYPE_CHECKING:
    from moetune.export.base import Export

SCHEMA_VERSION = 1


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="[PROFILE]", required=False)
@asks(required=False)
@click.option("--to", "target", metavar="ENGINE", required=True, help="vllm, sglang, flashinfer or trtllm.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True, help="The output folder.")
@click.option(
    "--for-version", metavar="V", help="The version that the files are for, of the engine or of FlashInfer.  [newest]"
)
@click.option("--force", is_flag=True, help="Replace files of other content.")
@store_option
@json_option
def export(
    path: Path | None,
    question: Question | None,
    target: str,
    out: Path,
    for_version: str | None,
    force: bool,
    store: Path | None,
    as_json: bool,
) -> None:
    """Write a stored profile as the files that an engine reads: the file PROFILE, or the answer to --model ….

    The files lie in a folder of the regime, with a README and their provenance beside them; warnings say where the
    engine would not read them or not bring the load that was measured.
    """
    from moetune.cli.stored import stored_profile
    from moetune.export import export as exported
    from moetune.export.write import write

    path, profile = stored_profile("export", path, question, store)
    version = ["--for-version", for_version] if for_version else []
    command = shlex.join(["moetune", "export", str(path), "--to", target, "--out", str(out), *version])
    result = exported(profile, target, version=for_version, source=str(path), command=command)
    if target in ("flashinfer", "trtllm"):
        from moetune.export.listed import check

        check(profile)
    states = write(result.files, out, force=force)
    folder = out / profile.regime.slug
    if as_json:
        from moetune.cli.output import document

        document(
            {
                "schema_version": SCHEMA_VERSION,
                "target": target,
                "profile": str(path),
                "folder": str(folder),
                "files": [{"path": str(file), "state": state} for file, state in states.items()],
                "variables": _variables(result, folder),
                "warnings": list(result.warnings),
                "notes": list(result.notes),
            }
        )
        return
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    for file, state in states.items():
        click.echo(f"{state}: {file}")
    for name, value in _variables(result, folder).items():
        click.echo(f"export {name}={shlex.quote(value)}")


def _variables(result: Export, folder: Path) -> dict[str, str]:
    from moetune.export.base import FOLDER

    return {name: value.replace(FOLDER, str(folder.resolve())) for name, value in result.variables.items()}
