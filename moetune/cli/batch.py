"""Defines the command `moetune batch`."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Argument, Command
from moetune.cli.options import json_option, request_of_words, store_option
from moetune.cli.output import document, line, on_terminal, report, show
from moetune.errors import MoetuneError, UsageError

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.cli.options import Request
    from moetune.store.store import Store
    from moetune.tuning.batch import Batch, BatchQuestion
    from moetune.tuning.batch_run import Answer
    from moetune.tuning.question import Question

FAILED = 1
EXAMPLE = "moetune batch jobs.yaml --dry-run"


@click.command(cls=Command, example=EXAMPLE)
@click.argument(
    "path", cls=Argument, type=click.Path(path_type=Path), metavar="FILE", meaning="YAML, or one job in each line."
)
@click.option("--dry-run", is_flag=True, help="Measure nothing: list the questions, and about how long they take.")
@click.option(
    "--device",
    metavar="DEVICE",
    help="Measure on this device alone: cpu, cuda or cuda:N.  [default: every GPU here, otherwise the CPU]",
)
@store_option
@json_option
def batch(path: Path, dry_run: bool, device: str | None, store: Path | None, as_json: bool) -> None:
    """Tune the layers and deployments that a file lists: each question once, on every GPU here.

    FILE has one launch line, or the options of one job, in each line. Or it is YAML: `jobs` is a list of objects with
    `model`, `launch` and `options`, each a text or a list of texts, and a job is made of each combination.

    Questions that several jobs ask are tuned once, and stored buckets are not tuned again. So the same command goes on
    after an interrupted run. Each GPU like the first one gets a process of its own. If a job fails, the others go on,
    and the exit code is 1.
    """
    from moetune.cli.streams import stdout_on_stderr
    from moetune.inputs.batch_file import read_jobs
    from moetune.store.store import Store
    from moetune.tuning.batch_run import devices_for

    jobs = read_jobs(path)
    folder = Store(store)
    with stdout_on_stderr():
        devices = devices_for(device)
        if device is None and devices == ("cpu",):
            report("note: there is no GPU here, so these are the questions of this CPU. Run it where the GPUs are.")
        planned, questions = _planned(jobs, folder, devices, str(path))
        result = planned if dry_run else _run(planned, questions)
    if as_json:
        document(result)
    else:
        from moetune.report.batch import batch_report

        show(*batch_report(result, narrow=on_terminal()))
    click.get_current_context().exit(FAILED if result.failures else 0)


def _planned(
    jobs: Sequence[tuple[str, ...]], store: Store, devices: Sequence[str], path: str
) -> tuple[Batch, list[Question]]:
    """Returns the batch before anything is measured, and its questions in the order of their numbers."""
    from moetune.tuning.batch import BatchJob, joined_questions, planned

    asked: list[list[Question]] = []
    failed: list[str] = []
    seen: set[str] = set()
    for number, words in enumerate(jobs, 1):
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                asked.append(_questions(words, store, devices[0]))
            failed.append("")
        except MoetuneError as error:
            asked.append([])
            failed.append(str(error))
            line(f"job {number} failed: {error}", err=True)
        for text in said.getvalue().splitlines():
            if text not in seen:
                report(f"job {number}: {text}")
                seen.add(text)
    questions, of_jobs = joined_questions(asked)
    entries = [
        BatchJob(number=number, words=words, questions=of_job, failed=why)
        for number, (words, of_job, why) in enumerate(zip(jobs, of_jobs, failed, strict=True), 1)
    ]
    return planned(questions, entries, path, devices), questions


def _questions(words: Sequence[str], store: Store, device: str) -> list[Question]:
    """Returns the questions of a job: one, or with `--backend auto` one for each backend that can run here."""
    from moetune.tuning.question import Question

    request = request_of_words(words)
    if request.device is not None:
        raise UsageError("--device in a job: a batch chooses the device.", "Give --device to `moetune batch`.")
    return [Question.of(request.layer, request.regime, backend, store, device) for backend in _backends(request)]


def _backends(request: Request) -> list[Backend]:
    from moetune.backends import registry
    from moetune.cli.backend_choice import backend_with, options_of_engine

    if not request.auto:
        return [request.backend]
    options = options_of_engine(request.engine)
    able, _ = registry.able(request.layer, request.regime)
    found = [backend_with(each.name, options[each.name]) if each.name in options else each for each in able]
    return found or [request.backend]  # the tune says why it cannot run


def _run(planned: Batch, questions: Sequence[Question]) -> Batch:
    """Answers the questions of a batch, and returns it with the answers."""
    from moetune.cli.batch_progress import BatchProgress
    from moetune.recordings.recording import known
    from moetune.tuning import batch_run

    began = time.monotonic()
    answered = {question.number: question for question in planned.questions}
    tasks = [
        batch_run.Task(number, each.layer, each.regime, each.backend, each.store, known(each.regime))
        for number, each in enumerate(questions, 1)
    ]

    def take(answer: Answer) -> None:
        answered[answer.number] = _answered(answered[answer.number], answer)
        progress.answer(answered[answer.number])

    with BatchProgress(planned) as progress:
        batch_run.run(tasks, planned.devices, progress.event, progress.start, take)
    return planned.model_copy(
        update={"questions": tuple(answered.values()), "dry_run": False, "seconds": time.monotonic() - began}
    )


def _answered(question: BatchQuestion, answer: Answer) -> BatchQuestion:
    changed: dict[str, object] = {"seconds": answer.seconds, "tuned_buckets": answer.tuned, "failed": answer.failed}
    if answer.profile is not None:
        changed |= {"path": answer.path, "gain": answer.profile.gain}
        changed["stored_buckets"] = len(answer.profile.choices) - answer.tuned
    changed["state"] = "failed" if answer.failed else "tuned" if answer.tuned else "stored"
    return question.model_copy(update=changed)
