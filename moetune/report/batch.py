"""Shows a batch as a table and lines for a terminal. Imports no torch."""

from __future__ import annotations

import shlex

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moetune.quoting import shortened
from moetune.report.format import duration, gain_digits
from moetune.report.lines import counted
from moetune.report.lists import folded
from moetune.report.table import add_numbers, new_table
from moetune.tuning.batch import Batch, BatchQuestion
from moetune.tuning.batch_cost import wall_s

EXAMPLE_DEVICES = 8
"""A plan for one device also says how long as many take."""


def batch_report(batch: Batch, *, narrow: bool = False) -> list[RenderableType]:
    """Returns a table with a row for each question of each job, the reasons of failures, and a line that sums up.

    Args:
        batch: the batch.
        narrow: whether long names are folded, for a terminal of 80 columns.
    """
    reported: list[RenderableType] = [batch_table(batch, narrow=narrow), Text()] if batch.questions else []
    reported += [
        Text(f"job {job.number} failed: {job.failed} ({shortened(shlex.join(job.words))})", style="yellow")
        for job in batch.jobs
        if job.failed
    ]
    reported += [
        Text(f"question {question.number} failed: {question.failed}", style="yellow")
        for question in batch.questions
        if question.failed
    ]
    return [*reported, Text(_cost_line(batch) if batch.dry_run else _summary(batch), style="bold")]


def batch_table(batch: Batch, *, narrow: bool = False) -> Table:
    """Returns a row for each question of each job. A question that an earlier job asks too has its number alone.

    The devices have a column if there are several, as in a cluster with different GPUs.
    """
    table = new_table()
    add_numbers(table, "job", "question")
    table.add_column("layer", overflow="fold")
    table.add_column("deployment", overflow="fold")
    table.add_column("kernels", overflow="fold")
    has_devices = len({question.device for question in batch.questions}) > 1
    if has_devices:
        table.add_column("device", overflow="fold")
    table.add_column("buckets", overflow="fold")
    add_numbers(table, "gain", "time")
    seen: set[int] = set()
    for job in batch.jobs:
        for number in job.questions:
            question = batch.questions[number - 1]
            names = (question.regime.slug, question.backend)
            what = [question.layer.name, *(folded(name) if narrow else name for name in names)]
            if has_devices:
                what.append(question.device)
            table.add_row(str(job.number), str(number), *what, *_result(batch, question, again=number in seen))
            seen.add(number)
    return table


def answer_line(question: BatchQuestion) -> str:
    """Returns what became of a question: `14 buckets tuned, 1.05×, 95 s`."""
    if question.state == "failed":
        return f"failed: {question.failed}"
    gain = "" if question.gain is None else f", {_gain(question.gain)}"
    if question.state == "stored":
        return f"{counted(question.stored_buckets, 'bucket')} stored{gain}"
    return f"{counted(question.tuned_buckets, 'bucket')} tuned{gain}, {duration(question.seconds)}"


def _result(batch: Batch, question: BatchQuestion, *, again: bool) -> list[Text | str]:
    """Returns the last three cells of a question: its buckets, their gain and the time."""
    if again:
        return [Text("as above", style="dim"), "", ""]
    gain = "–" if question.gain is None else _gain(question.gain)
    if batch.dry_run:
        estimated = f"~{duration(question.estimated_s)}" if question.missing_buckets and question.estimated_s else "–"
        return [_planned(question), gain, estimated]
    return [_answered(question), gain, duration(question.seconds) if question.tuned_buckets else "–"]


def _planned(question: BatchQuestion) -> str:
    stored = [f"{question.stored_buckets} stored"] if question.stored_buckets else []
    missing = [f"{question.missing_buckets} to tune"] if question.missing_buckets else []
    return ", ".join([*stored, *missing])


def _answered(question: BatchQuestion) -> Text:
    stored = [f"{question.stored_buckets} stored"] if question.stored_buckets else []
    tuned = [f"{question.tuned_buckets} tuned"] if question.tuned_buckets else []
    failed = ["failed"] if question.state == "failed" else []
    return Text(", ".join([*stored, *tuned, *failed]), style="yellow" if failed else "")


def _cost_line(batch: Batch) -> str:
    """Returns how long the missing buckets take by recorded figures."""
    asked = f"{counted(len(batch.questions), 'question')} of {counted(len(batch.jobs), 'job')}"
    missing = sum(question.missing_buckets for question in batch.questions)
    if not missing:
        return f"{asked}: all buckets are stored"
    costs = [question.estimated_s for question in batch.questions if question.estimated_s]
    unknown = sum(question.estimated_s is None for question in batch.questions)
    without = f"; {counted(unknown, 'question')} without a recorded figure" if unknown else ""
    if not costs:
        return f"{asked}: {counted(missing, 'bucket')} to tune{without}"
    devices = len(batch.devices) if len(batch.devices) > 1 else EXAMPLE_DEVICES
    several = f"{duration(wall_s(costs, devices))} on {devices}"
    return (
        f"{asked}: {counted(missing, 'bucket')} to tune, about {duration(batch.estimated_s)} on one device, {several}, "
        f"by recorded figures{without}"
    )


def _summary(batch: Batch) -> str:
    states = [question.state for question in batch.questions]
    done = f"{len(batch.jobs) - batch.failures} of {counted(len(batch.jobs), 'job')} done"
    of = f"{states.count('tuned')} tuned, {states.count('stored')} stored, {states.count('failed')} failed"
    return f"{done} in {duration(batch.seconds)}: {counted(len(states), 'question')}, {of}"


def _gain(gain: float) -> str:
    return f"{gain:.{gain_digits(gain)}f}×"
