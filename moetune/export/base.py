"""Defines `Export`, which every exporter returns, and adds a README and a provenance file to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Protocol

from moetune._version import __version__
from moetune.errors import NoResultError
from moetune.store.profile import Profile

FOLDER = "{folder}"
"""The placeholder for the regime's folder in `Export.usage` and `Export.variables`."""
SIDECAR_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Export:
    """The files of one profile for one engine; nothing is written yet.

    `files` maps relative POSIX paths to their text. `usage` is Markdown: how to make the engine read the files. It is
    equal for every layer of one regime. `variables` are the environment variables to set. Both contain `FOLDER` in
    place of the regime's folder. `warnings` are sentences: each says why the engine may ignore the files, or may
    produce another load than the one that was measured. `notes` are further sentences that need no action.
    """

    files: Mapping[str, str]
    usage: str
    variables: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Returns the files of a profile for a version of the engine (None: the newest that the exporter knows)."""

    def __call__(self, profile: Profile, version: str | None, /) -> Export: ...


def bundle(profile: Profile, target: str, exported: Export, source: str, command: str) -> Export:
    """Returns `exported` with a README and a provenance file added, below a folder named by the regime's slug.

    Both names contain the engine's name, so that files of several engines can share the folder.

    Raises:
        NoResultError: the profile is empty.
    """
    if not profile.choices:
        raise NoResultError("The profile has no choice to export.", "Tune it first.")
    names = sorted(exported.files)
    stem = PurePosixPath(names[0]).name.removesuffix(".json")
    files = {
        **exported.files,
        f"README.{target}.md": _readme(profile, target, exported),
        f"{stem}.{target}.moetune.json": _provenance(profile, target, exported, names, source, command),
    }
    return replace(exported, files={f"{profile.regime.slug}/{path}": text for path, text in files.items()})


def _readme(profile: Profile, target: str, exported: Export) -> str:
    """Returns the README. It is equal for every layer of one regime, because their files share the folder."""
    usage = exported.usage.replace(FOLDER, f"/path/to/{profile.regime.slug}")
    return (
        f"# {target}: tactics for {profile.regime.slug}\n{usage}\n\n"
        f"Written by moetune. `*.{target}.moetune.json` names the profile, the warnings and the notes of each file.\n"
    )


def _provenance(profile: Profile, target: str, exported: Export, names: list[str], source: str, command: str) -> str:
    document = {
        "schema_version": SIDECAR_SCHEMA_VERSION,
        "moetune": __version__,
        "target": target,
        "files": names,
        "command": command,
        "profile": {"path": source, "sha256": profile_digest(profile), "schema_version": profile.schema_version},
        "layer": profile.layer.model_dump(mode="json"),
        "regime": {**profile.regime.model_dump(mode="json"), "digest": profile.regime.digest},
        "backend": profile.backend,
        "environment": profile.environment.model_dump(mode="json"),
        "measured_at": max(choice.measured_at for choice in profile.choices),
        "warnings": list(exported.warnings),
        "notes": list(exported.notes),
    }
    return as_json(document)


def profile_digest(profile: Profile) -> str:
    """Returns the SHA-256 of the profile's JSON text as the store writes it."""
    return hashlib.sha256(profile.model_dump_json(indent=1).encode()).hexdigest()


def as_json(document: object) -> str:
    """Returns a document as indented JSON text with a final newline."""
    return json.dumps(document, indent=4, ensure_ascii=False, allow_nan=False) + "\n"
