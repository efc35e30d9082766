"""Defines the documents of a batch, and joins the questions of its jobs: equal ones are one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.store.key import Key
from moetune.store.profile import Profile
from moetune.tuning.batch_cost import recorded_s, wall_s
from moetune.tuning.question import Question
from moetune.tuning.refine import missing_buckets

Finite = Annotated[float, Field(allow_inf_nan=False)]
State = Literal["planned", "stored", "tuned", "failed"]


class BatchQuestion(FrozenModel):
    """One question of a batch and its answer.

    `number`: from 1. `device`: the name of the GPU or CPU that it is asked for. `state`: `planned` before it is
    answered, `stored` if nothing was measured, `tuned`, or `failed` for the reason `failed`. `path`: the profile's
    file; empty if there is none. `stored_buckets`, `tuned_buckets`: how many were stored before, and how many this run
    measured. `gain`: the geometric mean over all of them. `seconds`: how long it took. `estimated_s`: about how long
    the missing buckets take by recorded figures; None if there are none for this backend. `missing_buckets`: how many
    the run had to measure.
    """

    number: int
    layer: MoELayer
    regime: Regime
    backend: str
    device: str = ""
    state: State = "planned"
    path: str = ""
    stored_buckets: int = 0
    missing_buckets: int = 0
    tuned_buckets: int = 0
    gain: Finite | None = None
    seconds: Finite = 0.0
    estimated_s: Finite | None = None
    failed: str = ""

    @property
    def name(self) -> str:
        """The layer, the deployment and the kernels, in a few words."""
        return f"{self.layer.name} {self.regime.slug} by {self.backend}"


class BatchJob(FrozenModel):
    """One job of a batch: its `words` as the file has them, and the numbers of its questions, one for each backend.

    `failed`: why it has none: its words describe no question, or no backend can answer it here.
    """

    number: int
    words: tuple[str, ...]
    questions: tuple[int, ...] = ()
    failed: str = ""


class Batch(FrozenModel):
    """The jobs of a file, and their questions. A question that several jobs ask is there once.

    `devices`: where they are measured, one process for each. `dry_run`: nothing was measured. `estimated_s`: about how
    long all missing buckets take on one device by recorded figures, and `estimated_wall_s` on `devices`; both leave out
    the questions without a figure. `seconds`: how long the batch took.
    """

    schema_version: Literal[1] = 1
    file: str
    devices: tuple[str, ...]
    dry_run: bool
    jobs: tuple[BatchJob, ...]
    questions: tuple[BatchQuestion, ...]
    estimated_s: Finite
    estimated_wall_s: Finite
    seconds: Finite = 0.0

    @property
    def failures(self) -> int:
        """The number of jobs that have no answer, or not all."""
        bad = {question.number for question in self.questions if question.state == "failed"}
        return sum(bool(job.failed) or not bad.isdisjoint(job.questions) for job in self.jobs)


def joined_questions(jobs: Iterable[Sequence[Question]]) -> tuple[list[Question], list[tuple[int, ...]]]:
    """Returns the distinct questions of all jobs, and for each job the numbers of its own, from 1."""
    numbers: dict[tuple[str, ...], int] = {}
    questions: list[Question] = []
    of_jobs: list[tuple[int, ...]] = []
    for job in jobs:
        own: list[int] = []
        for question in job:
            key = Key(question.layer, question.regime, question.backend.name, question.environment)
            identity = (*key.path.parts, key.regime.digest, key.layer.digest)
            if identity not in numbers:
                questions.append(question)
                numbers[identity] = len(questions)
            own.append(numbers[identity])
        of_jobs.append(tuple(dict.fromkeys(own)))
    return questions, of_jobs


def planned(questions: Sequence[Question], jobs: Sequence[BatchJob], file: str, devices: Sequence[str]) -> Batch:
    """Returns the batch before anything is measured: what is stored, and how long the rest takes by recorded figures.

    Args:
        questions: the distinct questions, in the order of their numbers.
        jobs: the jobs.
        file: the file that they are from.
        devices: where they will be measured.
    """
    profiles = [each for _, each in questions[0].store.profiles() if isinstance(each, Profile)] if questions else []
    entries = [_planned(number, question, profiles) for number, question in enumerate(questions, 1)]
    costs = [entry.estimated_s for entry in entries if entry.estimated_s]
    return Batch(
        file=file,
        devices=tuple(devices),
        dry_run=True,
        jobs=tuple(jobs),
        questions=tuple(entries),
        estimated_s=sum(costs),
        estimated_wall_s=wall_s(costs, len(devices)),
    )


def _planned(number: int, question: Question, profiles: Sequence[Profile]) -> BatchQuestion:
    found = question.found()
    stored = found.profile if found else None
    missing = missing_buckets(stored.regime if stored else question.regime, stored)
    bucket_s = recorded_s(profiles, question.backend.name, question.environment.device)
    return BatchQuestion(
        number=number,
        layer=question.layer,
        regime=question.regime,
        backend=question.backend.name,
        device=question.environment.device,
        path=str(found.path) if found else "",
        stored_buckets=len(stored.choices) if stored else 0,
        missing_buckets=len(missing),
        gain=stored.gain if stored and stored.choices else None,
        estimated_s=None if bucket_s is None and missing else len(missing) * (bucket_s or 0.0),
    )
