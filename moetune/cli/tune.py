"""`moetune tune`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from moetune.bucket import Strategy
from moetune.cli.options import Question, asks, json_option, store_option
from moetune.cli.output import document, show


@click.command()
@asks()
@store_option
@click.option("--frozen", is_flag=True, help="Never measure; a miss exits 3.")
@click.option("--again", is_flag=True, help="Measure every bucket even where a profile has it.")
@click.option(
    "--strategy",
    type=click.Choice(get_args(Strategy)),
    default="auto",
    help="The backend's own search, or every tactic.  [default: auto]",
)
@click.option("--time-budget", type=float, metavar="S", help="About how many seconds it may take.  [default: no limit]")
@json_option
def tune(
    question: Question,
    store: Path | None,
    frozen: bool,
    again: bool,
    strategy: Strategy,
    time_budget: float | None,
    as_json: bool,
) -> None:
    """Measure the fastest tactic of each bucket, or serve it from the store or from moetune's packaged profiles.

    Each bucket is saved when it is known, so an interrupted run resumes. The default tactic is replaced only by one
    that is faster beyond the noise; the gain is shown with its 95 % bounds.
    """
    from moetune.cli.progress import Progress
    from moetune.store.store import Store
    from moetune.tune import tune as tune_of

    folder = Store(store)
    with Progress(question.regime.buckets) as progress:
        profile = tune_of(
            question.layer,
            question.regime,
            question.backend,
            folder,
            frozen=frozen,
            again=again,
            strategy=strategy,
            time_budget_s=time_budget,
            on_event=progress,
        )
    served = progress.served
    path = served.path if served else folder.path(profile.layer, profile.regime, profile.backend, profile.environment)
    packaged = bool(served and served.packaged)
    if as_json:
        document(profile, path=str(path), served=served is not None, packaged=packaged)
    else:
        from moetune.report.tables import profile_report

        show(*profile_report(profile, path, served=served is not None, packaged=packaged))
