"""Writes a profile as an engine's files and prints what was written, for `export` and `tune --export`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moetune.errors import UsageError
from moetune.spec.enums import ENGINE_TITLES

if TYPE_CHECKING:
    from moetune.cli.options import Request
    from moetune.store.match import Match
    from moetune.store.profile import Profile


class Written(NamedTuple):
    """The result of one export.

    Args:
        target: the engine.
        folder: where the files are.
        files: each file and its state, such as `written`.
        variables: the environment variables that make the engine read the files.
        warnings: the cases in which the engine does not read them.
        notes: what else the reader should know.
        flag: the flag with which the engine runs the kernels that read the files; empty if moetune knows none.
        check: the command that says whether the engine will find them; empty for engines that `lookup` does not know.
    """

    target: str
    folder: Path
    files: dict[Path, str]
    variables: dict[str, str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    flag: str = ""
    check: str = ""

    def document(self) -> dict[str, Any]:
        """Returns the fields of the JSON documents of `export` and `tune --export`."""
        return {
            "target": self.target,
            "folder": str(self.folder),
            "files": [{"path": str(file), "state": state} for file, state in self.files.items()],
            "variables": self.variables,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def write_for(
    target: str,
    found: Match,
    out: Path,
    *,
    for_version: str | None = None,
    force: bool = False,
    launch: str | None = None,
) -> Written:
    """Writes a profile below `out`, as the files that the engine `target` reads. Warns if the profile is a near one.

    `launch` is the engine's launch line, if the command has one.

    Raises:
        UsageError: no such engine or version.
        UnsupportedError: the engine has no use for this profile.
        StoreError: a file with other content is there and `force` is not given.
    """
    from moetune.export import export
    from moetune.export.base import FOLDER
    from moetune.export.write import write
    from moetune.report.lines import ladder_line, near_line, neutral_line, unknown

    path, profile = found.path, found.profile
    version = ["--for-version", for_version] if for_version else []
    command = shlex.join(["moetune", "export", str(path), "--to", target, "--out", str(out), *version])
    near, neutral = near_line(found.near) if found.near else "", neutral_line(found.neutral)
    warnings = (f"{near}.",) if near and not unknown(found.near) else ()
    notes = [f"{each}." for each in (near if not warnings else "", neutral) if each]
    notes += [f"{ladder_line(found.measured_ladder)}."] if found.measured_ladder else []
    result = export(
        profile, target, version=for_version, source=str(path), command=command, warnings=warnings, notes=tuple(notes)
    )
    if target in ("flashinfer", "trtllm"):
        from moetune.export.check import check

        check(profile)
    files = write(result.files, out, force=force)
    folder = out / profile.regime.slug
    variables = {name: value.replace(FOLDER, str(folder.resolve())) for name, value in result.variables.items()}
    start = _start(target, profile, folder, launch)
    return Written(target, folder, dict(files), variables, tuple(result.warnings), tuple(result.notes), *start)


def _start(target: str, profile: Profile, folder: Path, launch: str | None) -> tuple[str, str]:
    """Returns the engine's flag and the `lookup` that checks the files, both empty for other engines' files."""
    from moetune.export.fitting import TRITON_ENGINES
    from moetune.inputs.engine_flags import engine_flags
    from moetune.report.command import command

    if target not in TRITON_ENGINES:
        return "", ""
    line = launch or {"vllm": "vllm serve …", "sglang": "python -m sglang.launch_server …"}[target]
    triton = ("--triton-version", profile.environment.strict.get("triton", "")) if target == "sglang" else ()
    device = ("--device-name", profile.environment.device)
    words = ("lookup", "--launch", line, "--folder", str(folder), *device, *triton)
    return engine_flags(profile.backend, profile.layer.precision)[target], command(*words)


def request_for_engine(request: Request, for_version: str | None = None) -> Request:
    """Returns the request with the backend that the engine's files need, if the backend was left to moetune.

    Args:
        request: the command's request.
        for_version: the engine's version. vLLM's decides how the Triton kernel computes.

    Raises:
        UsageError: no engine is given, it reads no file for the given backend, or the kernel that was chosen computes
            in another way than that version's.
    """
    from moetune.backends import registry
    from moetune.backends.batched_triton.backend import BatchedTritonBackend
    from moetune.backends.grouped_triton.backend import TritonBackend
    from moetune.cli.backend_choice import backend_with, engine_options

    engine, regime = request.engine, request.regime
    if engine is None:
        raise UsageError(
            "--export needs an engine.",
            "Give --launch 'vllm serve …' or --dispatch ENGINE:NAME; or run `moetune export --to ENGINE` afterwards.",
        )
    if engine == "trtllm":
        if not request.auto:
            return request
        name = "flashinfer-trtllm-routed" if regime.attention_dp else "flashinfer-trtllm"
        return replace(request, backend=registry.backend(name), auto=False)
    if request.auto:
        name = "batched-triton" if regime.layout == "batched" else "triton"
        request = replace(request, backend=backend_with(name, engine_options(engine, name)), auto=False)
    if engine == "vllm" and isinstance(request.backend, BatchedTritonBackend):
        return request
    if not isinstance(request.backend, TritonBackend):
        raise UsageError(
            f"--export: {ENGINE_TITLES[engine]} reads files for Triton kernels only, not for {request.backend.name}.",
            "Tune without --export. moetune's plugin gives the profile to the engine (docs/engines.md).",
        )
    if engine == "vllm" and for_version is not None:
        return replace(request, backend=request.backend.for_version(for_version, request.layer, regime))
    return request


def say(written: Written) -> None:
    """Prints files and shell lines on stdout, warnings and notes on stderr."""
    from moetune.cli.output import line, report

    for warning in written.warnings:
        report(f"warning: {warning}")
    for note in written.notes:
        report(f"note: {note}")
    for file, state in written.files.items():
        line(f"{state}: {file}")
    if written.flag:
        line(f"check: {written.check}")
        line(f"start {ENGINE_TITLES[written.target]} with {written.flag} and:")
    for name, value in written.variables.items():
        line(f"export {name}={shlex.quote(value)}")
