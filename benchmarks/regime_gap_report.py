"""Formats the measurements of `regime_gap.py` as a summary and as Markdown.

A cell (model, ep, load B, rows) has a ratio for each load A and for the untuned `default`: the time under B of the
tactic that was tuned under A, over the time of the tactic that was tuned under B. It is 1 if both are the same tactic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from common import LOADS

from moetune import stats
from moetune.spec.environment import Environment

Line = Mapping[str, Any]

COMPARED = tuple(load for load in LOADS if load != "none")
DEFAULT = "default"
"""Stands in the place of a load for the tactic that the engine runs if nothing is tuned."""


def ratio(cell: Line, under: str) -> float | None:
    """Returns the cell's ratio for the load `under`, or None if it has no such tactic or one of the two failed."""
    found = _entry(cell, under)
    return found.get("ratio") if found else None


def summary(cells: Sequence[Line]) -> list[dict[str, Any]]:
    """Returns, for each A ≠ B, the geometric mean and the worst ratio over all cells, and the cell of the worst."""
    lines = []
    for under in (*COMPARED, DEFAULT):
        for load in COMPARED:
            pairs = [(value, cell) for cell in cells if cell["load"] == load and (value := ratio(cell, under))]
            if under == load or not pairs:
                continue
            worst, at = max(pairs, key=lambda pair: pair[0])
            lines.append(
                {"tuned_under": under, "run_under": load, "cells": len(pairs)}
                | {"geomean": stats.geomean([value for value, _ in pairs]), "worst": worst}
                | {"worst_at": {name: at[name] for name in ("model", "ep", "rows")}}
            )
    return lines


def markdown(cells: Sequence[Line], tunings: Sequence[Line], left_out: Sequence[str]) -> str:
    """Returns a table for each layer and ep, the summaries, and lists of all that failed or was left out."""
    parts = []
    groups = sorted({(cell["model"], cell["ep"]) for cell in cells})
    for model, ep in groups:
        mine = [cell for cell in cells if (cell["model"], cell["ep"]) == (model, ep)]
        parts += [f"### {model}, EP{ep}", _gap_table(mine), _summary_table(summary(mine))]
    if len(groups) > 1:
        parts += ["### All layers and EP sizes", _summary_table(summary(cells))]
    parts += _list("Left out:", left_out)
    parts += _list("Tactics that failed where they were compared:", failures(cells))
    parts += _list("Tactics that were rejected while tuning:", rejections(tunings))
    return "\n\n".join(parts)


def failures(cells: Sequence[Line]) -> list[str]:
    """Returns a line for each tactic that failed in a cell."""
    return [
        f"{cell['model']} EP{cell['ep']} {cell['load']}, {cell['rows']} rows, tuned under "
        f"{', '.join(entry['tuned_under'])}: {_spelled(entry['tactic'])}: {entry['failed']}"
        for cell in cells
        for entry in cell["entries"]
        if "failed" in entry
    ]


def rejections(tunings: Sequence[Line]) -> list[str]:
    """Returns a line for each tune that rejected tactics: how many, by the first part of the reason."""
    lines = []
    for tuning in tunings:
        reasons = Counter(reason.split(":")[0] for choice in tuning["choices"] for _, reason in choice["rejected"])
        if reasons:
            counts = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
            lines.append(f"{tuning['model']} EP{tuning['ep']} {tuning['load']}: {counts}")
    return lines


def require_same_environment(first: Line, other: Line) -> None:
    """Raises if two lines were measured on different machines or with different libraries.

    Raises:
        SystemExit: the environments differ.
    """
    mine, theirs = (Environment.model_validate(line["environment"]) for line in (first, other))
    if differing := mine.differing(theirs):
        raise SystemExit(f"The journal was measured in another environment: {differing}. Give another --journal.")


def _gap_table(cells: Sequence[Line]) -> str:
    unders = (*COMPARED, DEFAULT)
    rows = [
        f"| rows | run under | own µs | A/A | {' | '.join(f'tuned under {a}' for a in COMPARED)} | {DEFAULT} |",
        "|---" * (4 + len(unders)) + "|",
    ]
    for cell in sorted(cells, key=lambda cell: (cell["rows"], COMPARED.index(cell["load"]))):
        own = f"{cell['own_us']:.1f} | {cell['noise']:.1%}" if cell["own_us"] else "failed | "
        slowdowns = " | ".join(_slowdown(cell, under) for under in unders)
        rows.append(f"| {cell['rows']} | {cell['load']} | {own} | {slowdowns} |")
    return "\n".join(rows)


def _slowdown(cell: Line, under: str) -> str:
    found = _entry(cell, under)
    if found is None:
        return "–"
    if "failed" in found:
        return "failed"
    if under == cell["load"]:
        return "own"
    if found["ratio"] is None:
        return "?"
    return "same" if cell["load"] in found["tuned_under"] else _percent(found["ratio"])


def _summary_table(lines: Sequence[Line]) -> str:
    found = {(line["tuned_under"], line["run_under"]): line for line in lines}
    loads = [load for load in COMPARED if any(run == load for _, run in found)]
    rows = [f"| tuned under \\ run under | {' | '.join(loads)} |", "|---" * (1 + len(loads)) + "|"]
    for under in (*COMPARED, DEFAULT):
        if any(line["tuned_under"] == under for line in lines):
            texts = [_geomean_and_worst(found.get((under, load))) for load in loads]
            rows.append(f"| {under} | {' | '.join(texts)} |")
    return "Geometric mean / worst (at rows):\n\n" + "\n".join(rows)


def _geomean_and_worst(line: Line | None) -> str:
    if line is None:
        return "–"
    return f"{_percent(line['geomean'])} / {_percent(line['worst'])} ({line['worst_at']['rows']})"


def _entry(cell: Line, under: str) -> Line | None:
    return next((entry for entry in cell["entries"] if under in entry["tuned_under"]), None)


def _percent(value: float) -> str:
    return f"{100 * (value - 1):+.1f} %"


def _spelled(tactic: Line) -> str:
    return " ".join(f"{name}={value}" for name, value in tactic.items())


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return ["\n".join([title, "", *(f"- {line}" for line in lines)])] if lines else []
