"""`moetune show`."""

from __future__ import annotations

from pathlib import Path

import click

from moetune.cli.options import Question, asks, json_option, store_option
from moetune.cli.output import document
from moetune.cli.output import show as show_all


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="[PROFILE]", required=False)
@asks(required=False)
@store_option
@json_option
def show(path: Path | None, question: Question | None, store: Path | None, as_json: bool) -> None:
    """Print a stored profile: the file PROFILE, or the answer to --model … in the store.

    Nothing is measured; where the store has no answer, the error names what differs in the nearest one and exits 3.
    """
    from moetune.errors import UsageError
    from moetune.report.tables import profile_report
    from moetune.store.store import Store

    if (path is None) == (question is None):
        raise UsageError("`moetune show` takes either a profile's path or --model.", "See `moetune store list`.")
    folder = Store(store)
    if path is not None:
        profile = folder.read(path)
    else:
        from moetune.tune import load

        assert question is not None
        profile = load(question.layer, question.regime, question.backend, folder)
        path = folder.path(profile.layer, profile.regime, profile.backend, profile.environment)
    if as_json:
        document(profile, path=str(path))
    else:
        show_all(*profile_report(profile, path))
