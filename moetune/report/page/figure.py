"""What a figure of the page is: traces for plotly, and a table of the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final

from moetune.quoting import printable, shortened

COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colors (jfly.uni-koeln.de/color), which people with any color vision can tell apart."""
SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_TICKS: Final = tuple(4**power for power in range(13))
_TIME_TICKS: Final = tuple(float(f"{digit}e{power}") for power in range(-15, 16) for digit in (1, 2, 5))

_MOST_TICKS: Final = 12
Trace = dict[str, Any]
Layout = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NumberTable:
    """The numbers of a figure: titles, and rows of cells. Cells are plain text, not HTML."""

    titles: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure.

    Attributes:
        title: its heading, plain text.
        text: what is drawn, plain text.
        traces: plotly's traces. Text in them is escaped by `label`.
        layout: plotly's layout, without colors of the page: `page.js` sets these.
        table: the same numbers as a table.
    """

    title: str
    text: str
    traces: list[Trace]
    layout: Layout
    table: NumberTable
    height: int = 360


@dataclass(frozen=True, slots=True)
class Style:
    """The color and the symbol of the profile with a number. Seven symbols and six colors repeat after 42 profiles."""

    number: int
    color: str = field(init=False)
    symbol: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "color", COLORS[self.number % len(COLORS)])
        object.__setattr__(self, "symbol", SYMBOLS[self.number % len(SYMBOLS)])


def label(text: str) -> str:
    """Returns text for a figure. plotly reads tags and entities in it, so these are escaped."""
    return escape(shortened(printable(text)))


def number(value: float | int | None) -> str:
    """Returns a number for a table or a CSV: as it is stored, or nothing."""
    return "" if value is None else repr(value)


def rows_axis(rows: Sequence[int]) -> Layout:
    """Returns a logarithmic axis of row counts with a tick at powers of 4."""
    ticks = [tick for tick in _TICKS if not rows or min(rows) <= tick <= max(rows)] or sorted(set(rows))[:1]
    return {
        "type": "log",
        "title": {"text": "rows"},
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{tick:,}" for tick in ticks],
    }


def time_axis(times_us: Sequence[float]) -> Layout:
    """Returns a logarithmic axis of times in µs with a tick at 1, 2 and 5 of each decade, or at each decade."""
    low, high = min(times_us, default=1.0), max(times_us, default=1.0)
    ticks = [tick for tick in _TIME_TICKS if low / 2.5 <= tick <= high * 2.5]
    if len(ticks) > _MOST_TICKS:
        ticks = ticks[::3]
    return {
        "type": "log",
        "title": {"text": "µs"},
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{tick:,.12g}" for tick in ticks],
    }


def lines(x: Sequence[Any], y: Sequence[float], name: str, style: Style, **more: Any) -> Trace:
    """Returns a trace of points joined by a line, with a gap where a number is too large for a float."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(x),
        "y": [value if math.isfinite(value) else None for value in y],
        "name": label(name),
        "line": {"color": style.color, "width": 2},
        "marker": {"color": style.color, "symbol": style.symbol, "size": 7},
        **more,
    }
