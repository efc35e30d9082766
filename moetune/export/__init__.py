"""Exports profiles as the files that engines load. Exporters are pure functions and do not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moetune.errors import UsageError
from moetune.export.base import Export, Exporter, bundle
from moetune.export.write import State, write
from moetune.quoting import quoted
from moetune.store.profile import Profile

_HOMES: Mapping[str, str] = {
    "vllm": "moetune.export.vllm:export",
    "sglang": "moetune.export.sglang:export",
    "flashinfer": "moetune.export.flashinfer:export",
    "trtllm": "moetune.export.trtllm:export",
}


def targets() -> tuple[str, ...]:
    """Returns the engines that `--to` accepts."""
    return tuple(_HOMES)


def exporter(target: str) -> Exporter:
    """Imports and returns the exporter of an engine.

    Raises:
        UsageError: the engine is unknown.
    """
    if target not in _HOMES:
        raise UsageError(f"Cannot export to {quoted(target)}.", f"Engines: {', '.join(_HOMES)}.")
    module, _, attribute = _HOMES[target].partition(":")
    found: Exporter = getattr(importlib.import_module(module), attribute)
    return found


def export(
    profile: Profile,
    target: str,
    *,
    version: str | None = None,
    source: str = "",
    command: str = "",
    warnings: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Export:
    """Returns all files for one profile, below a folder named by the regime's slug.

    Args:
        profile: the profile.
        target: one of `targets()`.
        version: the engine's (or FlashInfer's) version. [default: the newest that the exporter knows]
        source: the profile's path. The provenance file contains it.
        command: the command that writes these files again. The provenance file contains it.
        warnings, notes: sentences that are added to those of the exporter.

    Raises:
        UsageError: an unknown engine or version.
        UnsupportedError: the engine cannot use a profile of this backend.
        NoResultError: the profile is empty.
    """
    exported = exporter(target)(profile, version)
    exported = replace(exported, warnings=(*warnings, *exported.warnings), notes=(*notes, *exported.notes))
    return bundle(profile, target, exported, source, command)


def export_profile(
    profile: Profile, target: str, folder: Path | str, *, version: str | None = None, force: bool = False
) -> dict[Path, State]:
    """Writes the files that an engine reads for one profile.

    Args:
        profile: the profile.
        target: one of `targets()`.
        folder: the output folder. The files go into a folder below it, named by the regime's slug.
        version: the engine's (or FlashInfer's) version. [default: the newest that the exporter knows]
        force: replace files that have other content.

    Returns:
        Each file's path with its state, `written` or `unchanged`.

    Raises:
        UsageError: an unknown engine or version, or a file with other content exists.
        UnsupportedError: the engine cannot use a profile of this backend.
        NoResultError: the profile is empty.
    """
    return write(export(profile, target, version=version).files, Path(folder), force=force)
