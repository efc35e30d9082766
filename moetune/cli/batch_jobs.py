"""Turns the jobs of a batch file into requests, and these into the questions of this machine or of a cluster."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetune.cli.options import Request, request_of_words
from moetune.cli.output import line, report
from moetune.errors import MoetuneError, UsageError

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.store.store import Store
    from moetune.tuning.batch import Batch
    from moetune.tuning.question import Question


@dataclass(frozen=True, slots=True)
class Job:
    """The words of a job, and the request that they describe, or why they describe none."""

    words: tuple[str, ...]
    request: Request | None
    failed: str = ""


def read(jobs: Sequence[tuple[str, ...]]) -> list[Job]:
    """Returns the jobs with their requests. Notes and warnings are printed once, errors for each job."""
    found: list[Job] = []
    seen: set[str] = set()
    for number, words in enumerate(jobs, 1):
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                found.append(Job(words, _request(words)))
        except MoetuneError as error:
            found.append(Job(words, None, str(error)))
            _report_failure(number, error)
        for text in said.getvalue().splitlines():
            if text not in seen:
                report(f"job {number}: {text}")
                seen.add(text)
    return found


def planned(
    jobs: Sequence[Job], questions_of: Callable[[Request], list[Question]], path: str, devices: Sequence[str]
) -> tuple[Batch, dict[int, Question]]:
    """Returns the batch before anything is measured, and its questions by their numbers.

    Args:
        jobs: the jobs.
        questions_of: returns the questions of a request.
        path: the file that the jobs are from.
        devices: where the questions will be measured.
    """
    from moetune.tuning.batch import BatchJob, joined_questions
    from moetune.tuning.batch import planned as planned_batch

    asked: list[list[Question]] = []
    failed: list[str] = []
    for number, job in enumerate(jobs, 1):
        own: list[Question] = []
        why = job.failed
        if job.request is not None:
            try:
                own = questions_of(job.request)
            except MoetuneError as error:
                why = str(error)
                _report_failure(number, error)
        asked.append(own)
        failed.append(why)
    questions, of_jobs = joined_questions(asked)
    entries = [
        BatchJob(number=number, words=job.words, questions=of_job, failed=why)
        for number, (job, of_job, why) in enumerate(zip(jobs, of_jobs, failed, strict=True), 1)
    ]
    return planned_batch(questions, entries, path, devices), dict(enumerate(questions, 1))


def questions_here(request: Request, store: Store, device: str) -> list[Question]:
    """Returns the questions of a request on this machine: with `--backend auto` of each backend that can run here."""
    from moetune.backends import registry
    from moetune.tuning.question import Question

    backends = [request.backend]
    if request.auto:
        able, _ = registry.able(request.layer, request.regime)
        backends = _with_engine_options(able, request) or backends  # the tune says why it cannot run
    return [Question.of(request.layer, request.regime, backend, store, device) for backend in backends]


def backends_of(request: Request) -> list[Backend]:
    """Returns the backends of a request: with `--backend auto` all that compute the layer, wherever they can run."""
    from moetune.backends import registry

    if not request.auto:
        return [request.backend]
    names = registry.backends_computing(request.layer, request.regime)
    return _with_engine_options([registry.backend(name) for name in names], request) or [request.backend]


def _request(words: Sequence[str]) -> Request:
    request = request_of_words(words)
    if request.device is not None:
        raise UsageError("--device in a job: a batch chooses the device.", "Give --device to `moetune batch`.")
    return request


def _with_engine_options(backends: Sequence[Backend], request: Request) -> list[Backend]:
    """Returns the backends with the options by which they compute what the request's engine computes."""
    from moetune.cli.backend_choice import backend_with, options_of_engine

    options = options_of_engine(request.engine)
    return [backend_with(each.name, options[each.name]) if each.name in options else each for each in backends]


def _report_failure(number: int, error: MoetuneError) -> None:
    line(f"job {number} failed: {error}", err=True)
