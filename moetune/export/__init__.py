"""Profiles as the files that engines load. Each exporter is a pure function; nothing here writes or imports torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from moetune.errors import UsageError
from moetune.export.base import Export, Exporter, bundle
from moetune.store.profile import Profile

_HOMES: Mapping[str, str] = {
    "vllm": "moetune.export.vllm:export",
    "sglang": "moetune.export.sglang:export",
    "flashinfer": "moetune.export.flashinfer:export",
    "trtllm": "moetune.export.trtllm:export",
}


def targets() -> tuple[str, ...]:
    """The engines that `--to` names."""
    return tuple(_HOMES)


def exporter(target: str) -> Exporter:
    """The exporter of an engine, imported now.

    Raises:
        UsageError: no such engine.
    """
    if target not in _HOMES:
        raise UsageError(f"Cannot export to {target!r}.", f"Engines: {', '.join(_HOMES)}.")
    module, _, attribute = _HOMES[target].partition(":")
    found: Exporter = getattr(importlib.import_module(module), attribute)
    return found


def export(profile: Profile, target: str, *, version: str | None = None, source: str = "", command: str = "") -> Export:
    """Everything that goes into the output folder for one profile, in a folder of the regime's slug.

    Args:
        profile: what was measured.
        target: one of `targets()`.
        version: of the engine (or of FlashInfer) that the files are for; each exporter's newest known when not given.
        source: the profile's path, for the provenance.
        command: what makes these files again, for the provenance.

    Raises:
        UsageError: no such engine, or a version that the exporter does not know.
        UnsupportedError: the engine has no use for a profile of this backend.
        NoResultError: the profile is empty.
    """
    return bundle(profile, target, exporter(target)(profile, version), source, command)
