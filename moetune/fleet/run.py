"""Answers the questions of a batch with the workers of a fleet. This process alone writes the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from moetune.errors import DamagedProfileError, MoetuneError
from moetune.fleet.cluster import Description, Ended, Lost, Message, Order
from moetune.fleet.fleet import Fleet
from moetune.fleet.portions import Portion, first_portions, portion_size
from moetune.fleet.schedule import Schedule
from moetune.recordings.recording import known
from moetune.report.lines import counted
from moetune.store.profile import Choice, Profile
from moetune.tuning.batch_run import Answer, OnAnswer, OnEvent, OnStart
from moetune.tuning.events import BucketChosen, Served
from moetune.tuning.question import Question
from moetune.tuning.refine import missing_buckets
from moetune.tuning.saving import Saver

OnNote = Callable[[str], None]
"""Is called with a line about the workers."""


def run(
    questions: Mapping[int, Question],
    fleet: Fleet,
    on_event: OnEvent,
    on_start: OnStart,
    on_answer: OnAnswer,
    on_note: OnNote,
    *,
    isolate: bool = True,
) -> None:
    """Answers all questions. One that fails costs only itself.

    Each choice is saved when it arrives, by the rule by which a tune saves. The buckets of a worker that is lost are
    tried again by another one, and those that fail too, if there is another one.

    Args:
        questions: the questions by their numbers; portions are handed out in this order.
        fleet: the workers. They run until the caller closes the cluster.
        on_event, on_answer: as in `batch_run.run`.
        on_start: is called with a question's number, and the worker and buckets of each portion of it that begins.
        on_note: is called when a worker is lost or joins, and when buckets are tried again.
        isolate: run kernels in a process of their own.
    """
    _Run(questions, fleet, on_event, on_start, on_answer, on_note, isolate).work()


@dataclass(slots=True)
class _Open:
    """A question that has missing buckets.

    `choices`: by rows. `portions`: how many are not finished. `tuned`, `count`: how many buckets are measured, and how
    many there will be as far as known. `is_last`: the portion with what the ladder `adaptive` adds was handed out.
    """

    question: Question
    saver: Saver
    choices: dict[int, Choice]
    count: int
    portions: int = 0
    tuned: int = 0
    is_last: bool = False
    began: float | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def profile(self) -> Profile:
        return self.question.profile(*(self.choices[rows] for rows in sorted(self.choices)))

    def missing(self) -> tuple[int, ...]:
        return missing_buckets(self.question.regime, self.profile)

    def left(self, portion: Portion) -> tuple[int, ...]:
        """Returns the buckets of a portion that have no choice."""
        return self.missing() if portion.adds else tuple(rows for rows in portion.rows if rows not in self.choices)


class _Run:
    def __init__(
        self,
        questions: Mapping[int, Question],
        fleet: Fleet,
        on_event: OnEvent,
        on_start: OnStart,
        on_answer: OnAnswer,
        on_note: OnNote,
        isolate: bool,
    ) -> None:
        self._questions, self._fleet, self._isolate = questions, fleet, isolate
        self._on_event, self._on_start, self._on_answer, self._on_note = on_event, on_start, on_answer, on_note
        self._schedule = Schedule()
        self._workers = dict(fleet.workers)
        self._open: dict[int, _Open] = {}

    def work(self) -> None:
        for number, question in self._questions.items():
            self._look_up(number, question)
        self._split()
        for worker in self._workers:
            self._join(worker)
        try:
            while not self._schedule.is_done:
                for worker, portion in self._schedule.assign():
                    self._start(worker, portion)
                if not self._schedule.is_done:
                    message = self._fleet.cluster.receive()
                    if message is None:
                        self._give_up()
                    else:
                        self._take(message)
        finally:
            for each in self._open.values():
                each.saver.raise_unsaved()

    def _look_up(self, number: int, question: Question) -> None:
        """Answers a question that is stored, and opens one that is not."""
        found = question.found()
        missing = missing_buckets(found.profile.regime if found else question.regime, found and found.profile)
        if found and not missing:
            packaged = question.store.is_packaged(found.path)
            self._on_event(number, Served(found.profile, found.path, packaged, found.differences))
            self._on_answer(Answer(number, 0.0, str(found.path), found.profile))
            return
        stored = found.profile if found else None
        choices = {choice.rows: choice for choice in stored.choices} if stored else {}
        self._open[number] = _Open(question, self._saver(number, question, stored), choices, len(missing))

    def _saver(self, number: int, question: Question, stored: Profile | None) -> Saver:
        return Saver(question, stored, False, lambda event: self._on_event(number, event))

    def _split(self) -> None:
        """Splits the questions into portions: in each environment so that every worker gets some."""
        buckets: dict[str, int] = {}
        for each in self._open.values():
            digest = each.question.environment.digest
            buckets[digest] = buckets.get(digest, 0) + len(each.missing())
        for number, each in self._open.items():
            able = sum(self._fleet.can_answer(worker, each.question) for worker in self._workers.values())
            size = portion_size(buckets[each.question.environment.digest], able)
            portions = first_portions(number, each.question.regime, each.missing(), size)
            each.portions, each.is_last = len(portions), portions[-1].adds
            self._schedule.add(portions)

    def _join(self, worker: int) -> None:
        description = self._workers[worker]
        able = [n for n, question in self._questions.items() if self._fleet.can_answer(description, question)]
        self._schedule.join(worker, able)

    def _start(self, worker: int, portion: Portion) -> None:
        """Hands a worker a portion, unless the store cannot be written."""
        each = self._open[portion.number]
        question = each.question
        if each.began is None:
            each.began = time.monotonic()
            try:
                question.ensure_writable()
            except MoetuneError as error:
                self._schedule.ended(worker)
                each.portions -= 1 + len(self._schedule.drop(portion.number))
                each.failures.append(str(error))
                self._finish_if_done(portion.number)
                return
        where = self._workers[worker].name
        if len(portion.rows) < each.count:
            where += f", {counted(len(portion.rows), 'bucket')} from {portion.rows[0]} rows"
        self._on_start(portion.number, where)
        order = Order(
            question.layer, question.regime, question.backend, question.environment.digest, portion.rows, each.profile,
            portion.adds, known(question.regime), self._isolate,
        )  # fmt: skip
        self._fleet.cluster.start(worker, order)

    def _take(self, message: Message) -> None:
        worker, content = message.worker, message.content
        match content:
            case Description():
                self._arrived(worker, content)
            case Lost():
                self._lost(worker, content.reason)
            case Ended():
                self._ended(worker, content.failed)
            case Choice():
                self._save(self._schedule.portion(worker).number, content)
            case _:
                self._on_event(self._schedule.portion(worker).number, content)

    def _arrived(self, worker: int, description: Description) -> None:
        if why := self._fleet.refusal(description):
            self._on_note(f"not used: {why}")
            return
        self._workers[worker] = description
        self._on_note(f"{description.name} joins.")
        self._join(worker)

    def _save(self, number: int, choice: Choice) -> None:
        each = self._open[number]
        each.tuned += choice.rows not in each.choices
        each.choices[choice.rows] = choice
        each.count = max(each.count, each.tuned)
        try:
            each.saver.save(choice)
        except DamagedProfileError as error:  # the file was moved aside, and has this choice alone
            self._on_note(str(error))
            with suppress(MoetuneError):  # the next save says so
                each.question.store.save(each.profile)
            each.saver = self._saver(number, each.question, each.profile)
        self._on_event(number, BucketChosen(choice, each.tuned - 1, each.count))

    def _ended(self, worker: int, failed: str) -> None:
        """Goes on after a worker has ended with its portion, or has failed."""
        portion = self._schedule.portion(worker)
        left = self._open[portion.number].left(portion)
        if not failed or not left:
            self._schedule.ended(worker)
            self._end(portion)
        elif self._schedule.failed(worker, left):
            self._again(portion, left, f"{self._workers[worker].name} failed: {failed}")
        else:
            self._end(portion, failed)

    def _lost(self, worker: int, reason: str) -> None:
        """Goes on without a worker."""
        name = self._workers.pop(worker).name if worker in self._workers else "A worker that was starting"
        why = f"{name} is lost: {reason}"
        if not self._schedule.is_busy(worker):
            self._schedule.leave(worker)
            self._on_note(why)
            return
        portion = self._schedule.portion(worker)
        left = self._open[portion.number].left(portion)
        if not left:
            self._schedule.ended(worker)
            self._schedule.leave(worker)
            self._on_note(why)
            self._end(portion)
        elif self._schedule.lost(worker, left):
            self._again(portion, left, why)
        else:
            self._on_note(why)
            self._end(portion, f"The workers that tuned it were lost {portion.tries + 1} times. {why}")

    def _again(self, portion: Portion, left: Sequence[int], why: str) -> None:
        buckets = counted(len(left), "bucket")
        self._on_note(f"{why} {buckets} of question {portion.number} will be tried elsewhere.")

    def _end(self, portion: Portion, failed: str = "") -> None:
        each = self._open[portion.number]
        each.portions -= 1
        if failed:
            each.failures.append(failed)
        self._finish_if_done(portion.number)

    def _give_up(self) -> None:
        """Ends the questions of the portions that no worker is left for."""
        for portion in self._schedule.drop():
            self._end(portion, f"No worker is left that can tune it at {', '.join(map(str, portion.rows))} rows.")

    def _finish_if_done(self, number: int) -> None:
        """Answers a question whose portions are finished, or hands out its last one."""
        each = self._open[number]
        if each.portions:
            return
        if not each.is_last and not each.failures and (rows := each.missing()):
            each.portions, each.is_last = 1, True
            self._schedule.add([Portion(number, rows, adds=True)])
            return
        del self._open[number]
        self._answer(number, each)

    def _answer(self, number: int, each: _Open) -> None:
        question, profile = each.question, None
        if each.tuned:
            try:
                profile = each.saver.finish()
            except MoetuneError as error:
                each.failures.append(str(error))
        if profile is not None and not each.missing():
            with suppress(MoetuneError):  # what stays in the journal is of no use, and does no harm
                question.journal().remove()
        key = question.layer, question.regime, question.backend.name, question.environment
        path = "" if profile is None else str(question.store.path(*key))
        seconds = 0.0 if each.began is None else time.monotonic() - each.began
        self._on_answer(Answer(number, seconds, path, profile, each.tuned, " ".join(dict.fromkeys(each.failures))))
