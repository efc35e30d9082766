"""Defines the command `moetune lookup`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetune.cli.help import Command
from moetune.cli.options import json_option
from moetune.cli.output import document, show
from moetune.errors import UsageError
from moetune.inputs.option_table import OPTIONS
from moetune.quoting import quoted

if TYPE_CHECKING:
    from moetune.export.engine_log import EngineLog
    from moetune.export.lookup import Lookup
    from moetune.export.places import Places
    from moetune.inputs.launch_table import TableLine

LOG_SCHEMA_VERSION = 1
MISS = 3
EXAMPLE = """\
moetune lookup --device-name "NVIDIA H200" --folder tuned/ep8-tp1-dp-allgather-random
  --launch "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel\""""
_BESIDE = ("model", "experts", "top_k", "hidden", "intermediate", "precision", "ladder", "tune_max_num_tokens")
"""The options of `option_table` that override the launch line here."""
_HELP = {
    "ladder": "The row counts to look up: a named ladder or a list.  [default: vllm, those of vLLM's own files; the "
    "capacity with a dispatcher of expert-major rows]",
    "tune_max_num_tokens": "The largest row count.  [default: 4096; 8192 with --ladder]",
}


def _takes_line(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed([option for option in OPTIONS if option.name in ("launch", *_BESIDE)]):
        attributes = {**option.attributes, **({"help": _HELP[option.name]} if option.name in _HELP else {})}
        command = click.option(*option.declarations, **attributes)(command)
    return command


@click.command(cls=Command, example=EXAMPLE, usage="--launch LINE | --log FILE [OPTIONS]")
@_takes_line
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="What VLLM_TUNED_CONFIG_FOLDER or SGLANG_MOE_CONFIG_DIR will name.  [default: the launch line's own; "
    "otherwise the installed engine's files]",
)
@click.option(
    "--device-name",
    metavar="NAME",
    help="The GPU's name as torch reports it, such as 'NVIDIA H200'.  [default: the GPU of this machine]",
)
@click.option(
    "--triton-version",
    metavar="V",
    help="The version of Triton that SGLang runs with.  [default: the installed one]",
)
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The engine's log, which proves which file was read. Without --launch it is read alone.",
)
@json_option
def lookup(
    launch: str | None,
    folder: Path | None,
    device_name: str | None,
    triton_version: str | None,
    log: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Say whether vLLM or SGLang will find a tuned file for its Triton experts, and why not.

    Both read a file of one exact name and ignore every other one without an error. For each row count, the answer is a
    hit or a miss. For a miss: which files lie near, and in which part of the name they differ; or that the kernels that
    the engine chooses read no file. The exit code is 0 if all are hits, otherwise 3.
    """
    if launch is None:
        if log is None:
            raise UsageError(
                "`moetune lookup` takes --launch, --log or both; neither is given.",
                "Give --launch 'vllm serve …', or --log with the engine's output.",
            )
        needless = {"folder": folder, "device_name": device_name, "triton_version": triton_version, **given}
        if words := [f"--{name.replace('_', '-')}" for name, value in needless.items() if value is not None]:
            raise UsageError(f"{', '.join(words)} given without --launch.", "Give --launch as well, or --log alone.")
        _log_alone(log, as_json)
        return
    from moetune.export.engine_log import read_log
    from moetune.export.lookup import lookup as look_up
    from moetune.inputs.launch_table import read

    line = read(launch, given)
    found = look_up(
        line,
        _device(device_name),
        _places(line, folder, triton_version),
        _rows(line, given),
        None if log is None else read_log(log),
    )
    _print(found, as_json, launch)
    click.get_current_context().exit(0 if found.hit else MISS)


def _log_alone(path: Path, as_json: bool) -> None:
    """Prints what a log says, and ends the command."""
    from moetune.export.engine_log import read_log

    log: EngineLog = read_log(path)
    if as_json:
        document({"schema_version": LOG_SCHEMA_VERSION, "hit": log.all_read, "log": log.model_dump(mode="json")})
    else:
        from moetune.report.lookup import log_report

        show(*log_report(log))
    click.get_current_context().exit(0 if log.all_read else MISS)


def _print(found: Lookup, as_json: bool, launch: str) -> None:
    if as_json:
        document(found)
    else:
        from moetune.report.lookup import lookup_report

        show(*lookup_report(found, launch))


def _rows(line: TableLine, given: dict[str, Any]) -> tuple[int, ...]:
    """Returns the row counts to look up: the buckets of `--ladder`; by default those of vLLM's own files, 1 to 4096.

    Expert-major rows are looked up by the capacity of their buffer alone.
    """
    if line.regime is not None and line.regime.layout == "batched":
        return line.regime.buckets
    from moetune.spec.ladder import Ladder
    from moetune.spec.regime import Regime

    most = given.get("tune_max_num_tokens")
    ladder = Ladder.parse(given.get("ladder") or "vllm")
    return Regime(ladder=ladder, **({} if most is None else {"tune_max_num_tokens": most})).buckets


def _device(name: str | None) -> str:
    """Returns the GPU's name.

    Raises:
        UsageError: no name is given and this machine has no GPU.
    """
    from moetune.backends.grouped_triton.shipped import device_name

    found = name or device_name()
    if not found:
        raise UsageError(
            "This machine has no GPU, and the name of a tuned file contains the GPU's.",
            "Give --device-name, such as 'NVIDIA H200': what torch.cuda.get_device_name() says on the GPU's machine.",
        )
    return found


def _places(line: TableLine, folder: Path | None, triton: str | None) -> Places:
    """Returns where the engine looks.

    Raises:
        UsageError: there is no such folder, or SGLang's Triton is not known.
    """
    from moetune.backends.grouped_triton.engine_files import release
    from moetune.backends.grouped_triton.shipped import EngineConfigs
    from moetune.export.places import Places
    from moetune.inputs.launch_table import FOLDER_VARIABLES

    source = "--folder" if folder is not None else FOLDER_VARIABLES[line.engine]
    own = folder if folder is not None else Path(line.folder) if line.folder else None
    if own is not None and not os.path.isdir(own):
        raise UsageError(
            f"{source} {quoted(str(own))} {'is no folder' if os.path.exists(own) else 'does not exist'}.",
            f"Give {'' if folder else '--folder with '}the folder that `moetune export` prints after "
            f"{FOLDER_VARIABLES[line.engine]}=.{'' if folder else ' Inside a container it may have another path.'}",
        )
    version = triton or _installed_triton()
    if version is None and line.engine == "sglang":
        raise UsageError(
            "SGLang sorts its files by Triton's version, and Triton is not installed here.",
            "Give --triton-version, such as 3.6.0.",
        )
    return Places(own, EngineConfigs.of(line.engine, None).folder, release(version) if version else "", source)


def _installed_triton() -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
