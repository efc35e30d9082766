"""Makes the empty tables that all reports share."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

MILLISECONDS_FROM_US = 1000.0
"""A time column is in ms if every time in it is at least this long."""


def new_table() -> Table:
    """Returns a table without columns."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")


def add_numbers(table: Table, *titles: str) -> None:
    """Adds columns of numbers, which are never folded."""
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)


def time_unit(times_us: Sequence[float]) -> tuple[float, str]:
    """Returns a unit for times in µs: the number of µs in it, and its name."""
    return (1e3, "ms") if times_us and min(times_us) >= MILLISECONDS_FROM_US else (1.0, "µs")
