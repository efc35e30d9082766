"""`moetune export`."""

from __future__ import annotations

from pathlib import Path

import click

from moetune.cli.options import Question, asks, json_option, store_option

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
    from moetune.cli.written import say, write_for

    path, profile = stored_profile("export", path, question, store)
    written = write_for(target, profile, path, out, for_version=for_version, force=force)
    if as_json:
        from moetune.cli.output import document

        document({"schema_version": SCHEMA_VERSION, "profile": str(path), **written.document()})
    else:
        say(written)
