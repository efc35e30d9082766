"""What `tune` shows on stderr while it measures: a bar with the time left on a terminal, else a line a bucket."""

from __future__ import annotations

import time
from itertools import combinations
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from moetune.cli.output import console
from moetune.report.format import duration, human_time
from moetune.report.tactics import tactic_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetune.store.profile import Choice
    from moetune.tuning.events import Event, Resumed, Served


class Progress:
    """A listener for `tune`'s events, and the context in which they are shown.

    Args:
        buckets: the row counts of the regime, ascending.
    """

    def __init__(self, buckets: Sequence[int]) -> None:
        self.served: Served | None = None
        self._buckets = buckets
        self._console = console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("buckets ·"),
            TimeElapsedColumn(),
            TextColumn("· {task.fields[left]}"),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._costs: list[tuple[int, float]] = []
        self._finished = 0
        self._began = 0.0
        self._tactics = 0
        self._measured = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()
        if isinstance(error, KeyboardInterrupt) and (self._finished or self._costs or self._measured):
            self._line(
                f"Finished buckets are saved: {self._finished + len(self._costs)}. The same command goes on from there."
            )

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        from moetune.tuning.events import (
            BucketChosen,
            BucketCompared,
            BucketsSkipped,
            BucketStarted,
            FamilyFailed,
            FamilyStarted,
            Resumed,
            SearchStopped,
            Served,
            TacticMeasured,
        )

        match event:
            case Served():
                self.served = event
            case Resumed():
                self._resume(event)
            case BucketStarted():
                self._start(event.rows, event.count, event.tactics)
            case TacticMeasured():
                self._measured += 1
                self._update(f"{event.rows} rows: {self._measured} of {self._tactics} tactics")
                if event.time_us is None:
                    self._line(f"{event.rows} rows: {tactic_line(event.tactic)} failed: {event.reason}")
            case SearchStopped():
                tried = f"{event.tried} of {event.tactics} tactics tried"
                self._line(f"{event.rows} rows: the time budget ended the search, {tried}")
            case BucketsSkipped():
                self._line(f"The time budget ended before the buckets {', '.join(map(str, event.rows))}.")
            case BucketChosen():
                self._finish(event.choice, event.index, event.count)
            case FamilyStarted() if event.count > 1:
                self._turn_to(f"{event.backend}, {event.index + 1} of {event.count} backends")
            case FamilyFailed():
                self._line(f"{event.backend} failed: {event.reason}")
            case BucketCompared():
                if event.index == 0:
                    self._turn_to("the backends' choices, side by side")
                self._line(f"[{event.index + 1}/{event.count}] {event.rows} rows")

    def _turn_to(self, what: str) -> None:
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None
        self._finished += len(self._costs)
        self._costs = []
        self._line(f"{what}:")

    def _resume(self, event: Resumed) -> None:
        if event.rows:
            buckets = ", ".join(map(str, event.rows))
            self._line(f"Going on at {buckets} rows, where a run was interrupted.")
        if event.failed:
            self._line(f"Tactics that failed there and are not tried again: {event.failed}. --again tries them.")
        for reason in event.unread:
            self._line(f"Ignored: {reason}")

    def _start(self, rows: int, count: int, tactics: int) -> None:
        self._began, self._tactics, self._measured = time.monotonic(), tactics, 0
        if self._console.is_terminal and self._task is None:
            self._task = self._bar.add_task("", total=count, left="estimating")
            self._bar.start()
        self._update(f"{rows} rows: {tactics} tactics")

    def _update(self, description: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, description=description)

    def _finish(self, choice: Choice, index: int, count: int) -> None:
        self._costs.append((choice.rows, time.monotonic() - self._began))
        remaining = [rows for rows in self._buckets if rows > choice.rows][: count - index - 1]
        left = f"about {duration(seconds_left(self._costs, remaining))} left" if remaining else "done"
        if self._task is not None:
            self._bar.update(self._task, advance=1, left=left)
        else:
            kept = choice.tactic == choice.default_tactic
            gain = "the default" if kept else f"{choice.gain:.2f}× the default"
            won = f"{human_time(choice.time_us)}, {gain}, by {tactic_line(choice.tactic)}"
            self._line(f"[{index + 1}/{count}] {choice.rows} rows: {won} · {left}")

    def _line(self, text: str) -> None:
        if self._task is not None:
            self._bar.console.print(text, markup=False)
        else:
            click.echo(text, err=True)


def seconds_left(costs: Sequence[tuple[int, float]], remaining: Sequence[int]) -> float:
    """The seconds that the `remaining` buckets will take.

    A bucket costs a fixed part and one in proportion to its rows: the Theil-Sen line (Sen, JASA 63, 1968), by the
    median of the slopes between all pairs, which a few disturbed buckets do not move. Of less than three measured
    buckets the dearest stands for each of the others.

    Args:
        costs: (rows, seconds) of each measured bucket, at least one.
        remaining: rows of the others.
    """
    if len(costs) < 3:
        return len(remaining) * max(seconds for _, seconds in costs)
    pairs = combinations(costs, 2)
    slope = max(0.0, median((late - early) / (more - fewer) for (fewer, early), (more, late) in pairs))
    fixed = median(seconds - slope * rows for rows, seconds in costs)
    return sum(max(0.0, fixed + slope * rows) for rows in remaining)
