"""Defines the command `moetune check`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from moetune.cli.help import Command, profile_argument
from moetune.cli.options import Request, json_option, near_option, store_option, takes_request
from moetune.cli.output import document
from moetune.cli.output import show as show_all
from moetune.errors import CheckFailedError, UsageError
from moetune.quoting import quoted

EXAMPLE = """\
moetune check --launch "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep"
  --within 2%"""
_PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%")


@click.command(cls=Command, example=EXAMPLE)
@profile_argument
@takes_request(required=False)
@store_option
@near_option
@click.option(
    "--within",
    metavar="P%",
    default="2%",
    help="By how much a choice may be slower than the default, or than what a new search finds.  [default: 2%]",
)
@click.option("--rows", metavar="N,…", help="The buckets to check.  [default: all]")
@click.option(
    "--under",
    metavar="DISTRIBUTION",
    multiple=True,
    help="Compare under this distribution alone too, such as zipf:1. It can be repeated.",
)
@json_option
def check(
    path: Path | None,
    request: Request | None,
    store: Path | None,
    near: bool,
    within: str,
    rows: str | None,
    under: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure whether the choices of a stored profile are still good on this machine.

    Run it after an upgrade of the driver, torch, Triton or the engine. Each bucket is searched anew. Then the choice,
    the default and what the search found are timed side by side, at every row count that maps to the bucket. Nothing
    is stored. The exit code is 4 if a choice is beaten.
    """
    from moetune.cli.progress import Progress
    from moetune.cli.stored import stored_profile
    from moetune.cli.streams import stdout_on_stderr
    from moetune.report.check import check_report
    from moetune.tuning.check import check as check_profile
    from moetune.tuning.check import undecided

    allowed, buckets = _percent(within), _row_counts(rows)
    found = stored_profile("check", path, request, store, near)
    with stdout_on_stderr(), Progress(saves=False) as progress:
        result = check_profile(
            found.profile,
            within=allowed,
            buckets=buckets,
            under=under,
            device=request.device if request else None,
            on_event=progress,
        )
    if as_json:
        document(result, path=str(found.path))
    else:
        show_all(*check_report(result, found.path))
    bad = len(result.of("beaten", "slower", "failed"))
    if bad:
        raise CheckFailedError(
            f"{bad} of {len(result.buckets)} choices do not hold.",
            "Tune again with --again, or with --start and this profile on a new store.",
        )
    if error := undecided(result):
        raise error


def _percent(text: str) -> float:
    match = _PERCENT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--within must be a percentage, given {quoted(text)}.", "Write it like 2% or 0.5%.")
    return float(match[1]) / 100


def _row_counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UsageError(f"--rows must be row counts, given {quoted(text)}.", "Write them like 8,64,512.")
    return tuple(dict.fromkeys(int(word) for word in words))
