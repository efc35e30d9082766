"""What `regime_gap.py` has measured, as summary and Markdown: numbers in, text out.

A cell (model, ep, load B, rows) holds, for each load A that a tactic was tuned under and for the untuned `default`, the
time of that tactic under B over the time of the tactic tuned under B itself: 1 where the two are the same tactic.
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
"""In the place of a load: what the engine runs where nothing is tuned."""


def ratio(cell: Line, under: str) -> float | None:
    """Time of the tactic tuned under `under` over that of the cell's own; None where there is none or it failed."""
    found = _entry(cell, under)
    return found.get("ratio") if found else None


def summary(cells: Sequence[Line]) -> list[dict[str, Any]]:
    """For each (A, B): geomean and worst ratio over all cells given, and where the worst is. A = B is left out."""
    told = []
    for under in (*COMPARED, DEFAULT):
        for load in COMPARED:
            pairs = [(value, cell) for cell in cells if cell["load"] == load and (value := ratio(cell, under))]
            if under == load or not pairs:
                continue
            worst, at = max(pairs, key=lambda pair: pair[0])
            told.append(
                {"tuned_under": under, "run_under": load, "cells": len(pairs)}
                | {"geomean": stats.geomean([value for value, _ in pairs]), "worst": worst}
                | {"worst_at": {name: at[name] for name in ("model", "ep", "rows")}}
            )
    return told


def markdown(cells: Sequence[Line], tunings: Sequence[Line], left_out: Sequence[str]) -> str:
    """All tables, one for each layer and ep, the summaries, and everything that failed or was left out."""
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
    """A line for each tactic that failed in a cell."""
    return [
        f"{cell['model']} EP{cell['ep']} {cell['load']}, {cell['rows']} rows, tuned under "
        f"{', '.join(entry['tuned_under'])}: {_spelled(entry['tactic'])}: {entry['failed']}"
        for cell in cells
        for entry in cell["entries"]
        if "failed" in entry
    ]


def rejections(tunings: Sequence[Line]) -> list[str]:
    """How many tactics every tune rejected, by the beginning of the reason."""
    lines = []
    for tuning in tunings:
        reasons = Counter(reason.split(":")[0] for choice in tuning["choices"] for _, reason in choice["rejected"])
        if reasons:
            counts = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
            lines.append(f"{tuning['model']} EP{tuning['ep']} {tuning['load']}: {counts}")
    return lines


def require_same_environment(first: Line, other: Line) -> None:
    """Times of different machines or libraries are not compared.

    Raises:
        SystemExit: the two lines were measured in different environments.
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


def _summary_table(told: Sequence[Line]) -> str:
    found = {(line["tuned_under"], line["run_under"]): line for line in told}
    loads = [load for load in COMPARED if any(run == load for _, run in found)]
    rows = [f"| tuned under \\ run under | {' | '.join(loads)} |", "|---" * (1 + len(loads)) + "|"]
    for under in (*COMPARED, DEFAULT):
        if any(line["tuned_under"] == under for line in told):
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
