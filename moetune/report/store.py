"""Shows what the files of a store are to this machine, and what a merge does to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rich.table import Table
from rich.text import Text

from moetune.quoting import enumerated
from moetune.report.table import new_table
from moetune.store.merge import Merged
from moetune.store.verify import BROKEN, State, Verified

_STYLES: Final = {State.MATCHES: "green", **dict.fromkeys(BROKEN, "red")}


def verified_table(files: Iterable[Verified], root: Path) -> Table:
    """Returns a table with a row for each file: what it is to this machine, the file, and why."""
    table = new_table()
    table.add_column("state", no_wrap=True)
    table.add_column("file", style="cyan", overflow="fold")
    table.add_column("why", overflow="fold")
    for file in files:
        below = file.path.relative_to(root) if file.path.is_relative_to(root) else file.path
        table.add_row(Text(file.state, style=_STYLES.get(file.state, "yellow")), str(below), file.why)
    return table


def verified_line(files: Iterable[Verified]) -> str:
    """Returns how many files have each state, as one line."""
    counts = Counter(file.state for file in files)
    return ", ".join(f"{counts[state]} {state}" for state in State if counts[state])


def merged_lines(merged: Merged) -> list[str]:
    """Returns what a merge does to one profile, as lines. The first has its file."""
    parts = [
        f"{len(rows)} {what}: {enumerated(rows)}"
        for what, rows in (
            ("new", merged.new),
            ("replaced by a later measurement", merged.replaced),
            ("kept, measured later here", merged.kept),
        )
        if rows
    ]
    return [str(merged.path), f"  {'; '.join(parts) or 'nothing new'}", *([f"  {merged.note}"] if merged.note else [])]
