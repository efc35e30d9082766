"""Shows on stderr what `batch` does: a line for each question, and on a terminal a bar over all buckets."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from moetune.cli.output import console, line
from moetune.cli.progress import bucket_bar
from moetune.report.batch import answer_line
from moetune.report.format import duration
from moetune.tuning.batch import Batch, BatchQuestion
from moetune.tuning.events import BucketChosen, BucketFailed, Event, NoisyBucket, NotJournaled, NotSaved


class BatchProgress:
    """The listener of a batch, and the context in which it is shown.

    Args:
        batch: the batch before anything is measured.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch, self._began = batch, time.monotonic()
        self._left = {question.number: question.missing_buckets for question in batch.questions}
        self._measured = self._answered = 0
        self._console = console(stderr=True)
        self._bar = bucket_bar(self._console)
        self._task = self._bar.add_task("", total=sum(self._left.values()), left=self.left)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        if isinstance(error, KeyboardInterrupt):
            self._line(f"Buckets that were finished are saved: {self._measured}. Run the same command again to go on.")

    @property
    def left(self) -> str:
        """About how long it will take: by the buckets of this run once there are some, else by recorded figures."""
        buckets = sum(self._left.values())
        if not buckets:
            return "done"
        if self._measured:
            return f"about {duration((time.monotonic() - self._began) * buckets / self._measured)} left"
        recorded = self._batch.estimated_wall_s
        return f"about {duration(recorded)} left" if recorded else "estimating"

    def start(self, number: int, device: str) -> None:
        """Shows that a question is being asked on a device."""
        where = f" on {device}" if len(self._batch.devices) > 1 else ""
        self._line(f"{self._of(number)} {self._question(number).name}{where}")
        self._update(self._where(number))

    def event(self, number: int, event: Event) -> None:
        """Counts a bucket that is decided, and shows what a reader must know."""
        match event:
            case BucketChosen():
                self._measured += 1
                self._left[number] = max(0, event.count - event.index - 1)
                self._update()
            case BucketFailed():
                self._line(f"{self._of(number)} {event.rows} rows: no result. {event.reason}")
            case NoisyBucket():
                self._line(f"{self._of(number)} {event.rows} rows: A/A noise of {100 * event.noise:.0f} %")
            case NotSaved() | NotJournaled():
                self._line(f"warning: {self._of(number)} {event.reason}")
            case _:
                pass

    def note(self, text: str) -> None:
        """Shows a line about the workers of a fleet."""
        self._line(f"note: {text}")

    def answer(self, question: BatchQuestion) -> None:
        """Shows the answer to a question, or why there is none."""
        self._answered += 1
        self._left[question.number] = 0
        self._update(self._where(question.number))
        self._line(f"{self._of(question.number)} {answer_line(question)} · {self.left}")

    def _where(self, number: int) -> str:
        """Returns how far the batch is: in which question, or with several devices how many have an answer."""
        if len(self._batch.devices) > 1:
            return f"{self._answered} of {len(self._batch.questions)} questions on {len(self._batch.devices)} devices"
        return f"question {number} of {len(self._batch.questions)}"

    def _of(self, number: int) -> str:
        return f"[{number}/{len(self._batch.questions)}]"

    def _question(self, number: int) -> BatchQuestion:
        return self._batch.questions[number - 1]

    def _update(self, description: str | None = None) -> None:
        total = self._measured + sum(self._left.values())
        self._bar.update(self._task, completed=self._measured, total=total, description=description, left=self.left)

    def _line(self, text: str) -> None:
        if self._console.is_terminal:
            self._bar.console.print(text, markup=False)
        else:
            line(text, err=True)
