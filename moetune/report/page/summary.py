"""The short table of several profiles, on a terminal and at the top of the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from moetune.report.page.numbers import Shown
from moetune.report.page.roofline import roofline_line
from moetune.report.table import add_numbers, new_table
from moetune.stats import geomean

_WORDS = ("profile", "backend", "device", "measured")
_NUMBERS = ("buckets", "gain", "least", "most", "time over\nroofline")


def titles() -> tuple[str, ...]:
    """Returns the titles of `summary_rows`."""
    return (*_WORDS, *(title.replace("\n", " ") for title in _NUMBERS))


def summary_rows(profiles: Sequence[Shown]) -> list[list[str]]:
    """Returns a row for each profile: its gains, and the geometric mean of its times over the roofline's."""
    return [_row(each) for each in profiles]


def summary_report(profiles: Sequence[Shown]) -> list[RenderableType]:
    """Returns the rows as a table, and what its columns mean."""
    table = new_table()
    for title in _WORDS:
        table.add_column(title, overflow="fold")
    add_numbers(table, *_NUMBERS)
    for row in summary_rows(profiles):
        table.add_row(*map(Text, row))
    lines = ["gain: the default's time over the choice's, geometric mean over the buckets; least, most: of one bucket"]
    lines += list(dict.fromkeys(roofline_line(each.profile, each.work) for each in profiles))
    return [table, Text(), *(Text(line, style="dim") for line in lines)]


def _row(shown: Shown) -> list[str]:
    profile = shown.profile
    gains = [choice.gain for choice in profile.choices]
    over = [row.time_us / row.least_us for row in shown.rows if row.least_us]
    day = max((choice.measured_at for choice in profile.choices), default="–")[:10]
    return [
        *(shown.label, profile.backend, profile.environment.device, day, str(len(gains))),
        *(f"{of(gains):.2f}×" if gains else "–" for of in (geomean, min, max)),
        f"{geomean(over):.2f}×" if over else "–",
    ]
