"""`moetune plan`."""

from __future__ import annotations

import click

from moetune.cli.options import Question, asks, json_option
from moetune.cli.output import document, show


@click.command()
@asks()
@json_option
def plan(question: Question, as_json: bool) -> None:
    """Show what each bucket's kernel will see and what travels; needs no GPU.

    For each bucket: rows, tokens a rank, local slots, load per local expert, active experts, bytes on the wire, bytes
    and FLOPs of the GEMMs and the tactics that would be tried.
    """
    from moetune.tuning.plan import plan as plan_of

    answer = plan_of(question.layer, question.regime, question.backend, rank=question.rank)
    if as_json:
        document(answer)
    else:
        from moetune.report.tables import plan_report

        show(*plan_report(answer))
