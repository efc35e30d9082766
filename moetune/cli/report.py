"""Defines the command `moetune report`."""

from __future__ import annotations

from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Command
from moetune.cli.options import json_option
from moetune.errors import UsageError

if TYPE_CHECKING:
    from moetune.report.page.numbers import Shown

SCHEMA_VERSION = 1


@click.command(cls=Command, example="moetune report random.json zipf.json -o report.html --csv report.csv")
@click.argument("paths", type=click.Path(path_type=Path), metavar="PROFILE...", nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write one HTML page.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the numbers as CSV.")
@json_option
def report(paths: tuple[Path, ...], out: Path | None, csv_path: Path | None, as_json: bool) -> None:
    """Show profiles as one HTML page, as CSV, or as a short table: times, roofline, gains and tactics.

    The page needs no network and asks for none; plotly must be installed to write it. Profiles of one layer are also
    compared by regime, and those that differ in the distribution only by skew. Nothing is measured.
    """
    from moetune.cli.output import document, line, show
    from moetune.report.page.numbers import shown
    from moetune.report.page.summary import summary_report
    from moetune.store.store import Store

    folder = Store(None)
    _require_apart(paths, out, csv_path)
    profiles = shown([(str(path), folder.read(path)) for path in paths])
    written = [*_page(profiles, paths, out, csv_path), *_csv(profiles, csv_path)]
    if as_json:
        from dataclasses import asdict

        rows = [asdict(row) for each in profiles for row in each.rows]
        files = [{"label": each.label, "path": each.path} for each in profiles]
        document({"schema_version": SCHEMA_VERSION, "written": written, "profiles": files, "rows": rows})
        return
    if out is None:
        show(*summary_report(profiles))
    for file in written:
        line(f"written: {file}")


def _page(profiles: list[Shown], paths: tuple[Path, ...], out: Path | None, csv_path: Path | None) -> list[str]:
    """Writes the page if it was asked for. Returns its path."""
    if out is None:
        return []
    import shlex
    from datetime import UTC, datetime

    from moetune.report.page.html import page

    words = ["moetune", "report", *map(str, paths), "-o", str(out), *(["--csv", str(csv_path)] if csv_path else [])]
    _write(out, page(profiles, shlex.join(words), datetime.now(UTC).date().isoformat()))
    return [str(out)]


def _csv(profiles: list[Shown], path: Path | None) -> list[str]:
    """Writes the CSV if it was asked for. Returns its path."""
    if path is None:
        return []
    from moetune.report.page.numbers import csv_text

    _write(path, csv_text(profiles))
    return [str(path)]


def _write(path: Path, text: str) -> None:
    from moetune.store.files import replace

    try:
        replace(path, text.encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", "Give another file.") from None


def _require_apart(paths: tuple[Path, ...], *outputs: Path | None) -> None:
    """Checks that no output is a profile, and that outputs differ.

    Raises:
        UsageError: two of the paths are one file.
    """
    taken = {realpath(path) for path in paths}
    for output in filter(None, outputs):
        if realpath(output) in taken:
            raise UsageError(f"{output} is given twice: it would be overwritten.", "Give -o and --csv other files.")
        taken.add(realpath(output))
