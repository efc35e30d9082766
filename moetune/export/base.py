"""What every exporter has in common: the `Export` it returns, and the README and the provenance beside its files."""

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
"""In `Export.usage` this stands for the regime's folder, wherever it will lie."""
SIDECAR_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Export:
    """The files of one profile for one engine; nothing is written yet.

    `files` maps relative POSIX paths to their text. `usage` is Markdown that says how the engine is made to read them,
    with `FOLDER` in place of the folder; equal for every layer of one regime. `variables` are the environment variables
    to set for it, with `FOLDER` likewise; none where the engine has none. `warnings`, a sentence each, say where
    the engine would not read the files or not bring the profile's load. `notes` say what is merely good to know.
    """

    files: Mapping[str, str]
    usage: str
    variables: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """A pure function of the profile and the version of the engine (None: the newest that the exporter knows)."""

    def __call__(self, profile: Profile, version: str | None, /) -> Export: ...


def bundle(profile: Profile, target: str, exported: Export, source: str, command: str) -> Export:
    """`exported` below a folder of the regime's slug, with a README and one provenance file beside it.

    Both have the engine in their name, so that several engines' files can share a folder.

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
    """The same for every layer of one regime, so that their files can share a folder."""
    usage = exported.usage.replace(FOLDER, f"/path/to/{profile.regime.slug}")
    return (
        f"# {target}: tactics for {profile.regime.slug}\n{usage}\n\n"
        f"Written by moetune; `*.{target}.moetune.json` say from which profile, and what to mind.\n"
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
    """SHA-256 of the profile as the store writes it, whatever white space its file has."""

    return hashlib.sha256(profile.model_dump_json(indent=1).encode()).hexdigest()


def as_json(document: object) -> str:
    """The JSON text of a file, with a final newline."""
    return json.dumps(document, indent=4, ensure_ascii=False, allow_nan=False) + "\n"
