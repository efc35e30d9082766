"""The figures of one profile: time against rows, gain over the default, and the map of tactics."""

from __future__ import annotations

from moetune.quoting import printable, shortened
from moetune.report.page.figure import Figure, NumberTable, Style, label, lines, number, rows_axis, time_axis
from moetune.report.page.numbers import Shown, line
from moetune.report.page.roofline import roofline_line
from moetune.spec.tactic import Tactic

_DEFAULT = Style(1)
_ROOF = Style(2)


def figures_of(shown: Shown, style: Style) -> list[Figure]:
    """Returns the figures of one profile that has a choice."""
    return [time_figure(shown, style), gain_figure(shown, style), tactics_figure(shown)]


def time_figure(shown: Shown, style: Style) -> Figure:
    """Returns the times of the choices and of the defaults by rows, with the device's roofline if it is known."""
    own = [row for row in shown.rows if row.kind == "bucket"]
    rows = [row.rows for row in own]
    traces = [
        lines(rows, [row.default_time_us for row in own], "default", _other(style), line=_line(_other(style), "dot")),
        lines(rows, [row.time_us for row in own], "choice", style),
    ]
    if least := [(row.rows, row.least_us) for row in own if row.least_us is not None]:
        roof = lines([x for x, _ in least], [y for _, y in least], "roofline", _ROOF, mode="lines")
        traces.append({**roof, "line": _line(_ROOF, "dash")})
    table = NumberTable(
        ("rows", "time (µs)", "default (µs)", "roofline (µs)", "weight bytes", "FLOP", "tried", "candidates"),
        [
            [number(x) for x in (
                row.rows, row.time_us, row.default_time_us, row.least_us, row.weight_bytes, row.flops, row.tried,
                row.candidates,
            )]
            for row in own
        ],
    )  # fmt: skip
    roofline = roofline_line(shown.profile, shown.work)
    text = f"Time of one run of this rank's experts, without the exchange between ranks; {roofline}."
    layout = {"xaxis": rows_axis(rows), "yaxis": time_axis([time for trace in traces for time in trace["y"]])}
    return Figure("Time against rows", text, traces, layout, table)


def gain_figure(shown: Shown, style: Style) -> Figure:
    """Returns the gain with its bounds at each row count at which the default was compared."""
    compared = [row for row in shown.rows if row.kind == "row count"] or shown.rows
    compared = sorted(compared, key=lambda row: row.rows)
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, row.gain_high - row.gain) for row in compared],
        "arrayminus": [max(0.0, row.gain - row.gain_low) for row in compared],
        "color": style.color,
        "thickness": 1.2,
        "width": 3,
    }
    x, y = [row.rows for row in compared], [row.gain for row in compared]
    trace = lines(x, y, "gain", style, mode="markers", error_y=bars)
    table = NumberTable(
        ("kind", "bucket", "rows", "gain", "95 % low", "95 % high", "A/A noise", "time (µs)", "regret at most"),
        [
            [row.kind, *map(number, (
                row.bucket, row.rows, row.gain, row.gain_low, row.gain_high, row.noise, row.time_us, row.regret_high
            ))]
            for row in shown.rows
        ],
    )  # fmt: skip
    text = (
        "The default's time over the choice's, with 95 % bounds, at each row count at which both were compared. "
        "Above 1 the choice is faster."
    )
    layout = {"xaxis": rows_axis(x), "yaxis": {"title": {"text": "gain"}}, "showlegend": False, "shapes": [_ONE]}
    return Figure("Gain over the default", text, [trace], layout, table)


def tactics_figure(shown: Shown) -> Figure:
    """Returns a map with a row for each bucket and a column for each parameter of its tactic."""
    choices = shown.profile.choices
    columns = _columns([choice.tactic for choice in choices])
    kept = ["kept" if choice.tactic == choice.default_tactic else "" for choice in choices]
    buckets = [f"{choice.rows:,}" for choice in choices]
    cells = [list(cells) for cells in zip(*columns.values(), strict=True)]
    ranks = {title: _ranks(cells) for title, cells in columns.items()}
    trace = {
        "type": "heatmap",
        "x": [label(title) for title in columns],
        "y": buckets,
        "z": [list(each) for each in zip(*ranks.values(), strict=True)],
        "text": [[label(_brief(cell, len(each))) for cell in each] for each in cells],
        "texttemplate": "%{text}",
        "hovertext": [[label(cell) for cell in each] for each in cells],
        "hovertemplate": "%{y} rows, %{x}: %{hovertext}<extra></extra>",
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "xaxis": {"side": "top", "type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed", "title": {"text": "rows"}},
    }
    table = NumberTable(
        ("rows", *columns, "default"),
        [[bucket, *each, word] for bucket, each, word in zip(buckets, cells, kept, strict=True)],
    )
    text = (
        "The tactic of each bucket. A column is one parameter; the lighter a cell, the larger its value among those of "
        f"its column. The default was kept in {sum(map(bool, kept))} of {len(kept)} buckets."
    )
    return Figure("Map of tactics", text, [trace], layout, table, height=110 + 20 * min(len(choices), _MOST_ROWS))


_ONE = {
    "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": {"width": 1, "dash": "dash"}
}  # fmt: skip
"""The gain of the default itself."""


def _other(style: Style) -> Style:
    """Returns a style of the default that differs from the choice's."""
    return _DEFAULT if style.color != _DEFAULT.color else Style(0)


def _line(style: Style, dash: str) -> dict[str, object]:
    return {"color": style.color, "width": 2, "dash": dash}


_MOST_COLUMNS, _MOST_ROWS = 24, 200
_ON_A_PHONE = 36
"""Characters that fit side by side in the map at a width of 360 pixels."""
_TITLES = {
    "BLOCK_SIZE_M": "M", "BLOCK_SIZE_N": "N", "BLOCK_SIZE_K": "K", "GROUP_SIZE_M": "group", "num_warps": "warps",
    "num_stages": "stages",
}  # fmt: skip


def _columns(tactics: list[Tactic]) -> dict[str, list[str]]:
    """Returns the cells of the map by title: one column for each parameter, or one with the tactics as lines."""
    names = list(dict.fromkeys(name for tactic in tactics for name in tactic))
    titles = [_TITLES.get(name, shortened(printable(name))) for name in names]
    if not names or len(names) > _MOST_COLUMNS or len(set(titles)) < len(names):
        return {"tactic": [line(tactic) for tactic in tactics]}
    return {
        title: [shortened(printable(str(tactic[name]))) if name in tactic else "" for tactic in tactics]
        for title, name in zip(titles, names, strict=True)
    }


def _brief(cell: str, columns: int) -> str:
    """Returns the characters of a cell that fit beside the other columns on a phone, and `…` if there are more.

    plotly shows the texts of a map only if all of them fit.
    """
    most = max(2, _ON_A_PHONE // columns - 1)
    return cell if len(cell) <= most else f"{cell[: most - 1]}…"


def _ranks(cells: list[str]) -> list[float]:
    """Returns the rank of each cell among the distinct cells, from 0 to 1; numbers are ordered as numbers."""
    order = sorted(set(cells), key=lambda cell: (not cell.lstrip("-").isdecimal(), _integer(cell), cell))
    return [order.index(cell) / max(1, len(order) - 1) for cell in cells]


def _integer(cell: str) -> int:
    return int(cell) if cell.lstrip("-").isdecimal() and len(cell) < 40 else 0
