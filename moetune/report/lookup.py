"""Shows whether an engine finds its tuned file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from moetune.export.engine_log import EngineLog, LoggedFile
from moetune.export.lookup import Lookup, Table
from moetune.export.near_misses import NearMiss
from moetune.report.command import command
from moetune.report.table import add_numbers, new_table
from moetune.spec.enums import ENGINE_TITLES

_EVENTS = {
    "read": "reads",
    "default": "runs its default, because it found no",
    "other_triton": "reads the file of another Triton",
    "reused": "takes the first GEMM's rows for the second one, because it found no",
}


def lookup_report(found: Lookup, launch: str = "vllm serve …") -> list[RenderableType]:
    """Returns a look-up as text: what the engine looks for, why there are misses, and the row counts if they differ.

    Args:
        found: the look-up.
        launch: the launch line, for the command to run next.
    """
    reported: list[RenderableType] = []
    for table in found.tables:
        reported += [_whole(f"{ENGINE_TITLES[found.engine]} looks for {table.name}", "bold")]
        reported += [_whole(f"  in {path}", "dim") for path in table.looked_in if table.file is None]
        reported += [_whole(line) for line in _file_lines(found, table)]
        if not any(found.kernels.why in reason for reason in table.reasons):
            reported.append(Text(f"kernels: {found.kernels.name}. {found.kernels.why}"))
        reported += [_whole(line, "yellow") for line in _reason_lines(table)]
        reported += [_whole(line) for near in table.near_misses for line in _near_lines(near)]
        reported += [Text(), _rows_table(table), Text()] if _differ(table) else []
    if found.log is not None:
        reported += log_report(found.log)
    reported += [_whole(f"warning: {warning}", "yellow") for warning in found.warnings]
    reported.append(Text(_verdict(found), style="bold green" if found.hit else "bold yellow"))
    if any(near.differs.keys() == {"device_name"} for table in found.tables for near in table.near_misses):
        words = command("tune", "--launch", launch, "--export", "tuned")
        reported.append(_whole(f"next, on a machine with {found.device}: {words}"))
    return reported


def _differ(table: Table) -> bool:
    """Returns whether row counts have different answers, or one takes another row of the file."""
    answers = {(row.hit, row.reason) for row in table.rows}
    return len(answers) > 1 or any(row.hit and row.key not in (None, row.rows) for row in table.rows)


def log_report(log: EngineLog) -> list[RenderableType]:
    """Returns what an engine's log says: which file was read, and for which one the default ran."""
    lines = [f"the log {log.path} says that the engine:"]
    lines += [f"  chooses {name}" for name in log.kernels]
    lines += [f"  {_event(file)}" for file in log.files]
    lines += [f"  takes the configurations of {shape} from a profile, through moetune's plugin" for shape in log.plugin]
    lines += ["  runs its default, because inference is deterministic"] if log.deterministic else []
    if len(lines) == 1:
        lines = [f"the log {log.path} names no tuned file: the kernels that ran read none, or lines are missing"]
    return [_whole(line) for line in lines]


def _event(file: LoggedFile) -> str:
    return f"{_EVENTS[file.event]} {file.path}"


def _rows_table(table: Table) -> RichTable:
    """Returns a table with a row for each row count: the key that the engine takes, and the answer."""
    shown = new_table()
    add_numbers(shown, "rows", "key")
    shown.add_column("answer", no_wrap=True)
    for row in table.rows:
        answer = Text("hit", style="green") if row.hit else Text("miss", style="yellow")
        shown.add_row(f"{row.rows:,}", "" if row.key is None else f"{row.key:,}", answer)
    return shown


def _file_lines(found: Lookup, table: Table) -> Iterator[str]:
    if table.file is not None:
        yield f"file: {table.file}"
    if table.down_file is not None and found.kernels.reads != "no":
        yield f"file of the second GEMM: {table.down_file}"
    elif found.engine == "sglang" and table.file is not None:
        yield "file of the second GEMM: none, so SGLang takes the first one's rows"


def _near_lines(near: NearMiss) -> Iterator[str]:
    yield f"near: {near.path}"
    yield f"  {near.meaning}"


def _reason_lines(table: Table) -> Iterator[str]:
    """Yields a line for each reason of misses, with the row counts if some have another answer."""
    for reason in table.reasons:
        rows = [row.rows for row in table.rows if row.reason == reason]
        at = "" if len(rows) == len(table.rows) else f" at {', '.join(f'{count:,}' for count in rows)} rows"
        yield f"miss{at}: {reason}"


def _verdict(found: Lookup) -> str:
    rows = [row for table in found.tables for row in table.rows]
    hits = sum(row.hit for row in rows)
    if found.hit:
        return f"hit: all {len(rows)} row counts"
    return f"miss: {len(rows) - hits} of {len(rows)} row counts"


def _whole(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True)
