"""Defines the command `moetune plan`."""

from __future__ import annotations

import click

from moetune.cli.help import Command
from moetune.cli.options import Question, asks, json_option
from moetune.cli.output import document, patience, show

EXAMPLE = """\
moetune plan --launch "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep
  --all2all-backend deepep_high_throughput\""""


@click.command(cls=Command, example=EXAMPLE)
@asks()
@json_option
def plan(question: Question, as_json: bool) -> None:
    """Show what the kernel of one rank gets in each bucket. Needs no GPU and measures nothing.

    For each bucket: rows, tokens per rank, local slots, slots per local expert, active experts, bytes on the wire,
    bytes and FLOPs of the GEMMs, and the number of tactics that `moetune tune` would try.
    """
    from moetune.tuning.plan import plan as plan_of

    layer, regime = question.layer, question.regime
    with patience(f"Simulating the router of {layer.name} for {len(regime.buckets)} buckets ..."):
        answer = plan_of(layer, regime, question.backend, question.device, rank=question.rank)
    if as_json:
        document(answer)
    else:
        from moetune.report.plan import plan_report

        show(*plan_report(answer))
