"""Defines the command `moetune batch`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Argument, Command
from moetune.cli.options import json_option, store_option
from moetune.cli.output import document, on_terminal, report, show
from moetune.errors import UsageError

if TYPE_CHECKING:
    from moetune.cli.batch_jobs import Job
    from moetune.cli.batch_progress import BatchProgress
    from moetune.store.store import Store
    from moetune.tuning.batch import Batch, BatchQuestion
    from moetune.tuning.batch_run import Answer

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
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Measure on every free GPU of a Ray cluster: auto or HOST:PORT, or local to start Ray on this machine.",
)
@store_option
@json_option
def batch(path: Path, dry_run: bool, device: str | None, ray: str | None, store: Path | None, as_json: bool) -> None:
    """Tune the layers and deployments that a file lists: each question once, on every GPU here or of a cluster.

    FILE has one launch line, or the options of one job, in each line. Or it is YAML: `jobs` is a list of objects with
    `model`, `launch` and `options`, each a text or a list of texts, and a job is made of each combination.

    Questions that several jobs ask are tuned once, and stored buckets are not tuned again. So the same command goes on
    after an interrupted run. Each GPU like the first one gets a process of its own. If a job fails, the others go on,
    and the exit code is 1.
    """
    from moetune.cli.batch_jobs import read
    from moetune.cli.streams import stdout_on_stderr
    from moetune.inputs.batch_file import read_jobs
    from moetune.store.store import Store

    if ray is not None and device is not None:
        raise UsageError("--ray measures on the GPUs of a cluster, --device on one here.", "Give one of them.")
    words = read_jobs(path)
    folder = Store(store)
    with stdout_on_stderr():
        jobs = read(words)
        if ray is None:
            result = _on_this_machine(jobs, folder, str(path), device, dry_run)
        else:
            result = _on_cluster(jobs, folder, str(path), ray, dry_run)
    if as_json:
        document(result)
    else:
        from moetune.report.batch import batch_report

        show(*batch_report(result, narrow=on_terminal()))
    click.get_current_context().exit(FAILED if result.failures else 0)


def _on_this_machine(jobs: Sequence[Job], store: Store, path: str, device: str | None, dry_run: bool) -> Batch:
    """Answers the questions of a batch on this machine."""
    from moetune.cli.batch_jobs import planned, questions_here
    from moetune.recordings.recording import known
    from moetune.tuning import batch_run

    devices = batch_run.devices_for(device)
    if device is None and devices == ("cpu",):
        report("note: there is no GPU here, so these are the questions of this CPU. Run it where the GPUs are.")
    batch, questions = planned(jobs, lambda request: questions_here(request, store, devices[0]), path, devices)
    if dry_run:
        return batch
    tasks = [
        batch_run.Task(number, each.layer, each.regime, each.backend, each.store, known(each.regime))
        for number, each in questions.items()
    ]
    return _answered_by(
        batch, lambda progress, take: batch_run.run(tasks, devices, progress.event, progress.start, take)
    )


def _on_cluster(jobs: Sequence[Job], store: Store, path: str, address: str, dry_run: bool) -> Batch:
    """Answers the questions of a batch on a Ray cluster."""
    from moetune.cli.batch_jobs import backends_of, planned
    from moetune.fleet import run as fleet_run
    from moetune.fleet.fleet import Fleet
    from moetune.fleet.ray_cluster import RayCluster

    backends = {id(job.request): backends_of(job.request) for job in jobs if job.request is not None}
    with RayCluster(address) as cluster:
        fleet = Fleet(cluster, [each for own in backends.values() for each in own])
        for why in fleet.left_out:
            report(f"warning: a worker is not used: {why}")
        if not fleet.has_gpu:
            report("note: no machine of the cluster has a GPU, so these are the questions of CPUs.")
        batch, questions = planned(
            jobs,
            lambda request: fleet.questions(request.layer, request.regime, backends[id(request)], store),
            path,
            fleet.names,
        )
        if dry_run:
            return batch
        return _answered_by(
            batch,
            lambda progress, take: fleet_run.run(questions, fleet, progress.event, progress.start, take, progress.note),
        )


def _answered_by(batch: Batch, run: Callable[[BatchProgress, Callable[[Answer], None]], None]) -> Batch:
    """Shows the progress of a run, and returns the batch with its answers."""
    from moetune.cli.batch_progress import BatchProgress

    began = time.monotonic()
    answered = {question.number: question for question in batch.questions}

    def take(answer: Answer) -> None:
        answered[answer.number] = _answered(answered[answer.number], answer)
        progress.answer(answered[answer.number])

    with BatchProgress(batch) as progress:
        run(progress, take)
    return batch.model_copy(
        update={"questions": tuple(answered.values()), "dry_run": False, "seconds": time.monotonic() - began}
    )


def _answered(question: BatchQuestion, answer: Answer) -> BatchQuestion:
    changed: dict[str, object] = {"seconds": answer.seconds, "tuned_buckets": answer.tuned, "failed": answer.failed}
    if answer.profile is not None:
        changed |= {"path": answer.path, "gain": answer.profile.gain}
        changed["stored_buckets"] = len(answer.profile.choices) - answer.tuned
    changed["state"] = "failed" if answer.failed else "tuned" if answer.tuned else "stored"
    return question.model_copy(update=changed)
