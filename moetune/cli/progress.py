"""Shows on stderr what `tune` and `check` do: a line for each finished bucket, and on a terminal a bar below them."""

from __future__ import annotations

import time
from functools import singledispatchmethod
from statistics import fmean
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from moetune.cli.output import console, line
from moetune.quoting import MOST_LISTED
from moetune.report.format import duration, human_time
from moetune.report.lines import counted, versions
from moetune.report.tactics import tactic_line
from moetune.tuning.events import (
    BackendFailed,
    BackendStarted,
    BucketChecked,
    BucketChosen,
    BucketCompared,
    BucketFailed,
    BucketsSkipped,
    BucketStarted,
    DefaultDiffers,
    Event,
    NoisyBucket,
    NotJournaled,
    NotSaved,
    Resumed,
    Revalidated,
    SearchStopped,
    Served,
    TacticMeasured,
    Throttled,
    TuneStarted,
)


def bucket_bar(console: Console) -> Bar:
    """Returns a bar that counts buckets. Its tasks have the field `left`: about how long the rest takes."""
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("buckets ·"),
        TimeElapsedColumn(),
        TextColumn("· {task.fields[left]}"),
        console=console,
        transient=True,
    )


class Progress:
    """A listener for the events of `tune` and `check`, and the context in which they are shown.

    Args:
        saves: whether finished buckets are stored, so that an interrupted command goes on from them.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self._saves = saves
        self.served: Served | None = None
        self.throttled: dict[str, tuple[str, ...]] = {}
        self._console = console(stderr=True)
        self._bar = bucket_bar(self._console)
        self._task: TaskID | None = None
        self._bucket_seconds: list[float] = []
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
        if (
            self._saves
            and isinstance(error, KeyboardInterrupt)
            and (self._finished or self._bucket_seconds or self._measured)
        ):
            saved = self._finished + len(self._bucket_seconds)
            self._line(f"Finished buckets are saved: {saved}. Run the same command again to go on.")

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        self._show(event)

    @singledispatchmethod
    def _show(self, event: Event) -> None:
        raise TypeError(f"Progress does not show {type(event).__name__}. Add a method for it.")

    @_show.register
    def _served(self, event: Served) -> None:
        self.served = event

    @_show.register
    def _revalidated(self, event: Revalidated) -> None:
        changed = {each.field: each.plain() for each in event.differences}
        measured = f", measured with {versions(changed)}" if changed else ""
        self._line(f"Checking the tactics of an older profile of {event.profile.backend}{measured}.")

    @_show.register
    def _resumed(self, event: Resumed) -> None:
        if event.rows:
            buckets = ", ".join(map(str, event.rows))
            times = f" Times that are not measured again: {event.timed}." if event.timed else ""
            self._line(f"Going on at {buckets} rows, where a run was interrupted.{times}")
        if event.failed:
            self._line(f"Tactics that failed there are not tried again: {event.failed}. Use --again to try them.")
        for reason in event.unread[:MOST_LISTED]:
            self._line(f"Ignored: {reason}")
        if (more := len(event.unread) - MOST_LISTED) > 0:
            self._line(f"Ignored: {more} more lines of the journal.")

    @_show.register
    def _tune_started(self, event: TuneStarted) -> None:
        self._line(f"tuning {event.backend} on {event.device}, {counted(event.count, 'bucket')}")

    @_show.register
    def _bucket_started(self, event: BucketStarted) -> None:
        self._began, self._tactics, self._measured = time.monotonic(), event.tactics, 0
        if self._console.is_terminal and self._task is None:
            self._task = self._bar.add_task("", total=event.count, left="estimating")
            self._bar.start()
        self._update(f"{counted(event.rows, 'row')}: {event.tactics} tactics")

    @_show.register
    def _default_differs(self, event: DefaultDiffers) -> None:
        self._line(f"warning: {event.warning}")

    @_show.register
    def _tactic_measured(self, event: TacticMeasured) -> None:
        self._measured += 1
        self._update(f"{counted(event.rows, 'row')}: {self._measured} of {self._tactics} tactics")
        if event.time_us is None and not event.known:
            self._line(f"{counted(event.rows, 'row')}: {tactic_line(event.tactic)} failed: {event.reason}")

    @_show.register
    def _search_stopped(self, event: SearchStopped) -> None:
        tried = f"{event.tried} of {event.tactics} tactics tried"
        self._line(f"{counted(event.rows, 'row')}: the time budget ended the search; {tried}")

    @_show.register
    def _noisy_bucket(self, event: NoisyBucket) -> None:
        then = "compared again after the other buckets" if event.tries else "so the default is kept"
        self._line(
            f"{counted(event.rows, 'row')}: A/A noise of {100 * event.noise:.0f} % is too much to decide, {then}"
        )

    @_show.register
    def _not_saved(self, event: NotSaved) -> None:
        self._line(f"warning: {counted(event.rows, 'row')}: the result cannot be saved yet. {event.reason}")

    @_show.register
    def _not_journaled(self, event: NotJournaled) -> None:
        self._line(f"warning: measurements are not journaled any more, a later run cannot go on. {event.reason}")

    @_show.register
    def _buckets_skipped(self, event: BucketsSkipped) -> None:
        self._line(f"The time budget ended before the buckets {', '.join(map(str, event.rows))}.")

    @_show.register
    def _throttled(self, event: Throttled) -> None:
        self.throttled[event.backend] = event.reasons
        self._line(
            f"warning: {event.backend}: the GPU was slowed down while it was measured: {', '.join(event.reasons)}. "
            "Gains hold, because tactics are timed in turns; times may be too long."
        )

    @_show.register
    def _bucket_chosen(self, event: BucketChosen) -> None:
        choice = event.choice
        kept = choice.tactic == choice.default_tactic
        gain = "the default" if kept else f"{choice.gain:.2f}× the default"
        best = f"{human_time(choice.time_us)}, {gain}, by {tactic_line(choice.tactic)}"
        self._finish(event.index, event.count, f"{counted(choice.rows, 'row')}: {best}")

    @_show.register
    def _bucket_checked(self, event: BucketChecked) -> None:
        checked = event.checked
        reason = f", {checked.reason}" if checked.reason else ""
        self._finish(event.index, event.count, f"{checked.rows} rows: {checked.finding}{reason}")

    @_show.register
    def _bucket_failed(self, event: BucketFailed) -> None:
        self._line(f"{counted(event.rows, 'row')}: no result. {event.reason}")

    @_show.register
    def _backend_started(self, event: BackendStarted) -> None:
        if event.count > 1:
            self._turn_to(f"{event.backend}, {event.index + 1} of {event.count} backends")

    @_show.register
    def _backend_failed(self, event: BackendFailed) -> None:
        self._line(f"{event.backend} failed: {event.reason}")

    @_show.register
    def _bucket_compared(self, event: BucketCompared) -> None:
        if event.index == 0:
            self._turn_to("the backends' choices, side by side")
        self._line(f"[{event.index + 1}/{event.count}] {counted(event.rows, 'row')}")

    def _finish(self, index: int, count: int, result: str) -> None:
        """Shows the result of bucket `index` of `count`, and about how long the others take."""
        self._bucket_seconds.append(time.monotonic() - self._began)
        remaining = max(0, count - len(self._bucket_seconds))
        left = f"about {duration(remaining * fmean(self._bucket_seconds))} left" if remaining else "done"
        if self._task is not None:
            self._bar.update(self._task, advance=1, left=left)
        estimate = f" · {left}" if self._task is None else ""
        self._line(f"[{index + 1}/{count}] {result}{estimate}")

    def _turn_to(self, what: str) -> None:
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None
        self._finished += len(self._bucket_seconds)
        self._bucket_seconds = []
        self._line(f"{what}:")

    def _update(self, description: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, description=description)

    def _line(self, text: str) -> None:
        if self._task is not None:
            self._bar.console.print(text, markup=False)
        else:
            line(text, err=True)
