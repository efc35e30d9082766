"""Shows lists as tables for a terminal: layers, backends, facts and stored profiles. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from moetune.quoting import enumerated
from moetune.report.lines import routing_line
from moetune.report.table import FittedTable, add_numbers, new_table
from moetune.spec.layer import MoELayer
from moetune.store.profile import Profile

if TYPE_CHECKING:
    from moetune.backends.registry import Diagnosis

_SLUG_WIDTH = 22
"""The width of a regime's slug in a terminal of 80 columns."""


def models_table(models: Iterable[tuple[MoELayer, str]], *, addresses: bool = True) -> FittedTable:
    """Returns a table with a row for each named layer.

    Args:
        models: the layers, and the addresses of their configs.
        addresses: whether a column has the addresses. Otherwise the names are links to them.
    """
    table = new_table()
    table.add_column("model", no_wrap=True)
    add_numbers(table, "experts", "top-k", "hidden", "inter-\nmediate")
    table.add_column("precision", no_wrap=True)
    table.add_column("routing")
    if addresses:
        table.add_column("source", style="dim", overflow="fold")
    for layer, source in models:
        sizes = (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
        table.add_row(
            Text(layer.name, style="" if addresses else f"link {source}"),
            *(f"{size:,}" for size in sizes),
            layer.precision.value,
            routing_line(layer.routing),
            *([source] if addresses else []),
        )
    return FittedTable(table, ("source", "routing", "inter-\nmediate", "hidden", "top-k"))


def backends_table(diagnoses: Iterable[Diagnosis]) -> Table:
    """Returns a table with a row for each backend: whether it can run here and, if not, the reason and the remedy."""
    table = new_table()
    table.add_column("backend", no_wrap=True)
    table.add_column("runs\nhere")
    table.add_column("why not, and what to do")
    for diagnosis in diagnoses:
        runs = Text("yes", style="green") if diagnosis.available else Text("no", style="yellow")
        why = Text("\n").join([Text(diagnosis.reason), Text(diagnosis.hint, style="dim")])
        table.add_row(diagnosis.name, runs, why if diagnosis.reason else "")
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Returns a table of names and values without a header."""
    table = new_table()
    table.show_header = False
    table.add_column(style="dim")
    table.add_column()
    for name, value in facts:
        table.add_row(name.replace("_", " "), value)
    return table


def store_table(entries: Iterable[tuple[Path, Profile]], root: Path, *, files: bool = True) -> FittedTable:
    """Returns a table with a row for each stored profile: layer, regime, ladder, backend, Triton, device, buckets, day.

    Args:
        entries: the profiles and their files.
        root: the folder that the files are in.
        files: whether a column has the files. Otherwise the regimes are links to them, with the ladder below them, and
            Triton's version is below the backend.
    """
    table = new_table()
    table.add_column("layer", no_wrap=True)
    table.add_column("regime, ladder" if not files else "regime", no_wrap=not files)
    if files:
        table.add_column("ladder")
    table.add_column("backend", no_wrap=not files)
    if files:
        table.add_column("triton")
    table.add_column("device")
    add_numbers(table, "buckets")
    table.add_column("measured", no_wrap=True)
    if files:
        table.add_column("file", style="cyan", overflow="fold")
    for path, profile in entries:
        measured = max((choice.measured_at for choice in profile.choices), default="–")
        slug, ladder = profile.regime.slug, enumerated(str(profile.regime.ladder).split(","), most=4, separator=",")
        triton = profile.environment.strict.get("triton", "")
        below = str(path.relative_to(root) if path.is_relative_to(root) else path)
        link = Text(folded(f"{slug}, {ladder}"), style=f"link {path.absolute().as_uri()}")
        table.add_row(
            profile.layer.name,
            *([slug, ladder, profile.backend, triton] if files else [link, folded(f"{profile.backend} {triton}")]),
            profile.environment.device,
            f"{len(profile.choices)}/{len(profile.regime.buckets)}",
            measured[:10],
            *([below] if files else []),
        )
    return FittedTable(table, ("measured", "buckets"))


def folded(text: str) -> str:
    """Returns a text of parts joined by hyphens and spaces in lines of `_SLUG_WIDTH`, broken behind one of these."""
    lines = [""]
    for part in re.split(r"(?<=[- ])", text.strip()):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > _SLUG_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
