"""Copies measured profiles into profiles/, which is packaged with moetune, and lists them in its README.

    python benchmarks/package_profiles.py STORE/*/*/*/triton-*.json

Without a file it only lists the packaged profiles. A profile must have all of its buckets. It replaces a packaged one
of the same question.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from moetune.errors import UsageError
from moetune.report.tune_command import command, whole_command
from moetune.spec.environment import Environment
from moetune.store.profile import Profile
from moetune.store.store import Store

PACKAGED = Path(__file__).parent.parent / "profiles"
HEADING = "\n## What is here\n"


def main() -> None:
    """Packages the files that are given, and writes the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", type=Path, nargs="*", help="files of a store")
    parser.add_argument("--into", type=Path, default=PACKAGED, help="the folder, with its README.md")
    given = parser.parse_args()
    for path in given.profiles:
        print(package(Store(path.parents[3]).read(path), given.into))
    readme = given.into / "README.md"
    readme.write_text(listed(readme.read_text(encoding="utf-8"), given.into), encoding="utf-8")


def package(profile: Profile, folder: Path) -> Path:
    """Writes the profile to its place below `folder`, in the store's layout.

    Raises:
        UsageError: the profile lacks buckets.
    """
    if missing := sorted(set(profile.regime.buckets) - {choice.rows for choice in profile.choices}):
        raise UsageError(f"{command(profile)}: the buckets {missing} are not tuned.", "Tune them first.")
    path = Store(folder).path(profile.layer, profile.regime, profile.backend, profile.environment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def listed(readme: str, folder: Path) -> str:
    """Returns the README with the list of all profiles in `folder` after its last heading."""
    found = [(path, entry) for path, entry in Store(folder).profiles() if isinstance(entry, Profile)]
    tables = [
        _table(environment, entries, folder)
        for environment, entries in groupby(
            sorted(found, key=lambda entry: (_environment(entry[1].environment), entry[0])),
            key=lambda entry: _environment(entry[1].environment),
        )
    ]
    return readme.partition(HEADING)[0] + HEADING + ("\n".join(tables) or "None has been measured for release yet.\n")


def _environment(environment: Environment) -> str:
    return ", ".join([environment.device, *(f"{name} {value}" for name, value in sorted(environment.strict.items()))])


def _table(environment: str, entries: Iterable[tuple[Path, Profile]], folder: Path) -> str:
    lines = [
        f"{environment}:\n",
        "| made by | buckets | gain over the default, geometric mean | measured | file |",
        "|---|---|---|---|---|",
    ]
    for path, profile in entries:
        gain = math.exp(sum(math.log(choice.gain) for choice in profile.choices) / len(profile.choices))
        measured = max(choice.measured_at for choice in profile.choices)[:10]
        file = path.relative_to(folder)
        lines.append(f"| `{whole_command(profile)}` | {len(profile.choices)} | {gain:.2f}× | {measured} | `{file}` |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
