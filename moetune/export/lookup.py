"""Says whether vLLM or SGLang will find a tuned file for a launch line, and why not.

Both ignore a file of another name without an error. The rules are those of `get_moe_configs` and
`try_get_optimal_moe_config` in vLLM 0.33.0 and SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from moetune.backends.grouped_triton.engine_files import DTYPES, ConfigFile, sglang_folder
from moetune.backends.grouped_triton.shipped import FOLDERS, read_rows
from moetune.errors import UsageError
from moetune.export.engine_log import EngineLog
from moetune.export.near_misses import NearMiss, near_misses
from moetune.export.places import Places
from moetune.inputs.engine_kernels import Kernels, Reads, block_shape, capability_of, chosen
from moetune.inputs.launch_table import TableLine
from moetune.spec.enums import ENGINE_TITLES
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.untrusted import read_json

FAR: Final = 2.0
"""A row count is far from a key if one is more than this factor above the other."""
_COMPARED: Final = ("ep_size", "tp_size", "attention_dp", "dispatch", "layout", "redundant_experts")
"""The fields of a regime by which a file of another deployment is recognized."""


class LookedUpRow(FrozenModel):
    """What the engine runs for one row count.

    Attributes:
        rows: the row count.
        hit: whether it runs a row of the table that is meant for it.
        key: the file's row count that it takes; None if it reads no file.
        reason: why this is a miss; empty for a hit.
    """

    rows: int
    hit: bool
    key: int | None = None
    reason: str = ""


class Table(FrozenModel):
    """The look-up of one file name.

    Attributes:
        name: the name that the engine looks for.
        looked_in: the paths that it tries, in order.
        file: the path that it reads; None if there is none.
        down_file: SGLang's file of the second GEMM; None if that takes the first one's.
        rows: one entry for each row count.
        near_misses: files in the folders that are not read, the nearest first.
        logged: what the engine's log says of the name; None without a log, or if it does not name it. `plugin` if
            moetune's plugin answers from a profile, so that no file is read.
    """

    name: str
    looked_in: tuple[str, ...]
    file: str | None
    down_file: str | None = None
    rows: tuple[LookedUpRow, ...]
    near_misses: tuple[NearMiss, ...] = ()
    logged: str | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why rows are misses, each reason once."""
        return tuple(dict.fromkeys(row.reason for row in self.rows if row.reason))


class ChosenKernels(FrozenModel):
    """The MoE kernels; see `engine_kernels.Kernels`."""

    name: str
    reads: Reads
    why: str
    remedy: str = ""


class Lookup(FrozenModel):
    """The answer of `moetune lookup`.

    Attributes:
        engine, device: the engine, and the GPU's name.
        hit: whether every row count is a hit.
        kernels: the MoE kernels that the engine chooses.
        tables: one entry for each file name that ranks look for; two if they have different numbers of experts.
        log: what the engine's log says; None if none is given.
        warnings: what else to know.
    """

    schema_version: Literal[1] = 1
    engine: str
    device: str
    hit: bool
    kernels: ChosenKernels
    tables: tuple[Table, ...]
    log: EngineLog | None = None
    warnings: tuple[str, ...] = ()


def lookup(line: TableLine, device: str, places: Places, rows: Sequence[int], log: EngineLog | None = None) -> Lookup:
    """Returns whether the engine finds a tuned file for each row count.

    Args:
        line: what the launch line says.
        device: the GPU's name, as torch reports it.
        places: where the engine looks.
        rows: the row counts of a rank's kernel.
        log: the engine's log. It proves what was read, whatever moetune expects of the kernels.

    Raises:
        UsageError: a file cannot be read, or the line's sizes do not fit the layer.
    """
    kernels = chosen(line, capability_of(device))
    block = block_shape(line)
    dtype = DTYPES.get(line.layer.precision)
    size = line.intermediate_size
    tables = tuple(
        _table(line, ConfigFile(experts, size, device, dtype, block), kernels, places, rows, log)
        for experts in line.num_experts
    )
    return Lookup(
        engine=line.engine,
        device=device,
        hit=all(row.hit for table in tables for row in table.rows),
        kernels=ChosenKernels(name=kernels.name, reads=kernels.reads, why=kernels.why, remedy=kernels.remedy),
        tables=tables,
        log=log,
        warnings=(*line.warnings, *_warnings(line, places, tables)),
    )


def _table(
    line: TableLine,
    file: ConfigFile,
    kernels: Kernels,
    places: Places,
    rows: Sequence[int],
    log: EngineLog | None,
) -> Table:
    vllm = line.engine == "vllm"
    name = file.vllm_name if vllm else file.sglang_name()
    if log is not None and f"E={file.num_experts}, N={file.intermediate_size}" in log.plugin:
        answered = tuple(LookedUpRow(rows=count, hit=True) for count in rows)
        return Table(name=name, looked_in=(), file=None, rows=answered, logged="plugin")
    folders = places.folders(line.engine)
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    down = None
    if not vllm:
        second = file.sglang_name(down=True)
        down = next((str(folder / second) for folder in folders if (folder / second).is_file()), None)
    by_key = read_rows(found, has_triton_version=vllm, option="--folder") if found else {}
    logged = log.of(name) if log is not None else None
    problem = _by_log(line, name, log, places) if log is not None else ""
    proven = log is not None and not problem
    if not problem:
        problem = _file_problem(line, name, found, by_key, places, proven=proven)
    near = near_misses(line, file, name, found, folders, places) if problem else ()
    answers = tuple(_row(count, by_key, kernels, problem, found, proven=proven) for count in rows)
    return Table(
        name=name,
        looked_in=tuple(str(folder / name) for folder in folders),
        file=str(found) if found and kernels.reads != "no" else None,
        down_file=down,
        rows=answers,
        near_misses=near,
        logged=logged.event if logged is not None else None,
    )


def _row(
    rows: int, by_key: Mapping[int, object], kernels: Kernels, problem: str, found: Path | None, *, proven: bool
) -> LookedUpRow:
    if not proven:
        if kernels.reads != "yes":
            runs = "runs" if kernels.reads == "no" else "may run"
            return LookedUpRow(
                rows=rows,
                hit=False,
                reason=f"The engine {runs} {kernels.name}: it reads no tuned file then. {kernels.why} {kernels.remedy}",
            )
        if kernels.most_rows is not None and rows > kernels.most_rows:
            reason = f"Above {kernels.most_rows} rows the engine runs {kernels.name}: it reads no tuned file then. "
            return LookedUpRow(rows=rows, hit=False, reason=reason + kernels.remedy)
    if found is None and proven:
        return LookedUpRow(rows=rows, hit=True)
    if found is None or not by_key:
        return LookedUpRow(rows=rows, hit=False, reason=problem)
    key = min(by_key, key=lambda key: abs(key - rows))
    if problem:
        return LookedUpRow(rows=rows, hit=False, key=key, reason=problem)
    if max(key, rows) > FAR * max(1, min(key, rows)):
        keys = ", ".join(map(str, sorted(by_key)[:8])) + (", …" if len(by_key) > 8 else "")
        reason = f"The file has no row count near: its keys are {keys}. Tune the missing buckets and export again."
        return LookedUpRow(rows=rows, hit=False, key=key, reason=reason)
    return LookedUpRow(rows=rows, hit=True, key=key)


def _by_log(line: TableLine, name: str, log: EngineLog, places: Places) -> str:
    """Returns why the log proves a miss; empty if it proves that the file was read."""
    said = log.of(name)
    if log.deterministic:
        return "The log says that deterministic inference made SGLang run its default configuration."
    if said is None:
        others = ", ".join(dict.fromkeys(file.name for file in log.files))
        saw = (
            f"It names {others}." if others else "It names no file at all: the kernels that ran read none, or the log "
        )
        return f"The log does not name {name}. {saw if others else saw + 'is cut.'}"
    if said.event == "default":
        return f"The log says that the engine found no {name} and runs its default configuration."
    if said.event == "other_triton":
        return f"The log says that SGLang reads {said.path}, tuned with another version of Triton."
    if places.own is not None and any(folder in said.path for folder in FOLDERS[line.engine]):
        return f"The log says that the engine reads its own {said.path}, not the one of {places.source}."
    return ""


def _file_problem(
    line: TableLine, name: str, found: Path | None, by_key: Mapping[int, object], places: Places, *, proven: bool
) -> str:
    """Returns what is wrong with the file, or that there is none; empty if all is well."""
    title = ENGINE_TITLES[line.engine]
    if found is None:
        if proven:  # on the machine that the log is from
            return ""
        if places.own is None and places.shipped is None:
            return (
                f"{title} is not installed here and no folder is given, so there is no {name} to find. "
                "Give --folder DIR, as `moetune export` printed it."
            )
        if line.engine == "sglang" and places.root is not None and not places.root.is_dir():
            return f"There is no folder {places.root}: SGLang looks for configs/ there and stops with an error."
        return f"There is no {name} where {title} looks."
    if not by_key:
        return f"{found} has no row, so {title} runs its default configuration."
    if places.own is not None and not found.is_relative_to(places.own):
        return f"{places.source} {places.own} has no {name}; {title} reads its own {found}."
    if line.engine == "sglang" and found.parent.name != sglang_folder(places.triton):
        return (
            f"SGLang has no {name} for Triton {places.triton} and falls back to {found}, tuned with another version. "
            f"Tune with Triton {places.triton}, or give --triton-version."
        )
    return _other_deployment(line, name, places)


def _other_deployment(line: TableLine, name: str, places: Places) -> str:
    """Returns how the deployment that moetune exported the file for differs from the line's; empty if it does not."""
    if places.own is None:
        return ""
    path = places.own / f"{name.removesuffix('.json')}.{line.engine}.moetune.json"
    try:
        origin = read_json(path)
        layer, regime = MoELayer(**origin["layer"]), origin["regime"]
        regime = Regime(**{key: value for key, value in regime.items() if key != "digest"})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UsageError):
        return ""
    mine, theirs = line.layer.shape, layer.shape
    found = [(key, theirs[key], mine[key]) for key in mine if mine[key] != theirs[key]]
    if line.regime is not None:
        fields = regime.differing(line.regime)
        found += [(key, *fields[key]) for key in _COMPARED if key in fields]
    if not found:
        return ""
    said = ", ".join(f"{key} {theirs} (the line's is {mine})" for key, theirs, mine in found)
    return (
        f"The file was tuned for another deployment, which its name does not show: {said}. Use one folder for each "
        "deployment."
    )


def _warnings(line: TableLine, places: Places, tables: Sequence[Table]) -> Iterator[str]:
    looked_for = places.own is not None and any(table.file is None for table in tables)
    if line.engine == "vllm" and places.shipped is None and looked_for:
        yield "vLLM is not installed here, so its own files are not looked at."
    if line.regime is None:
        yield f"moetune does not model the load of {line.dispatcher}, so it does not compare it with a file's."
    if line.has_plugin:
        yield "The line sets MOETUNE_REGIME: where moetune's plugin has a profile, it answers, and no file is read."
    for table in tables:
        if table.logged == "read" and table.file is None:
            yield f"The log says that {table.name} was read. It is not here, so its row counts are not checked."
