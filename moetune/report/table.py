"""Makes the empty tables that all reports share."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

MILLISECONDS_FROM_US = 1000.0
"""A time column is in ms if every time in it is at least this long."""

MOST_COLUMNS = 10_000
"""The width at which a cell is measured."""


def new_table() -> Table:
    """Returns a table without columns."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")


def add_numbers(table: Table, *titles: str) -> None:
    """Adds columns of numbers, which are never folded."""
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A table that leaves out columns, and says which, where the terminal is too narrow to show all of them whole.

    Args:
        table: the table.
        spare: the titles of the columns that can be left out, the first one first.
    """

    table: Table
    spare: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the table as far as it fits, and a line about the columns that are left out."""
        shown, left_out = _unbroken(self.table, console, options), []
        titles = [str(column.header) for column in shown.columns]
        for title in (title for title in self.spare if title in titles):
            if Measurement.get(console, options.update(width=MOST_COLUMNS), shown).minimum <= options.max_width:
                break
            shown = _without(shown, title)
            left_out.append(title.replace("-\n", "").replace("\n", " "))
        yield shown
        if left_out:
            yield Text(f"left out at this width: {', '.join(left_out)}; a pipe and --json have all", style="dim")


def _unbroken(table: Table, console: Console, options: ConsoleOptions) -> Table:
    """Returns a copy of the table whose columns without a fold have at least the width of their longest cell."""
    wide = options.update(width=MOST_COLUMNS)

    def width(cell: object) -> int:
        return Measurement.get(console, wide, cell).maximum if isinstance(cell, str | Text) else 0

    found = copy(table)
    found.columns = [
        replace(column, min_width=max(map(width, (column.header, *column.cells)))) if column.no_wrap else column
        for column in table.columns
    ]
    return found


def _without(table: Table, title: str) -> Table:
    """Returns a copy of the table without the column of this title."""
    found = copy(table)
    kept = [column for column in table.columns if str(column.header) != title]
    found.columns = [replace(column, _index=index) for index, column in enumerate(kept)]
    return found


def time_unit(times_us: Sequence[float]) -> tuple[float, str]:
    """Returns a unit for times in µs: the number of µs in it, and its name."""
    return (1e3, "ms") if times_us and min(times_us) >= MILLISECONDS_FROM_US else (1.0, "µs")
