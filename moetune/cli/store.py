"""Defines the command `moetune store`, and `moetune store list`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetune.cli.help import Command, Commands
from moetune.cli.options import json_option, store_option
from moetune.cli.output import document, on_terminal, show
from moetune.cli.store_files import merge, prune, root_line, verify

if TYPE_CHECKING:
    from moetune.store.profile import Profile

SCHEMA_VERSION = 1


@click.group(cls=Commands)
def store() -> None:
    """List the stored profiles, compare them with this machine, merge other stores, and delete what is replaced."""


for command in (verify, merge, prune):
    store.add_command(command)


@store.command(
    cls=Command,
    name="list",
    example="moetune store list",
    short_help="List the profiles and the files that cannot be read.",
)
@store_option
@json_option
def list_profiles(store: Path | None, as_json: bool) -> None:
    """List the profiles of the stores, those packaged with moetune, and the files that cannot be read.

    In a pipe and with --json, each has its file.
    """
    from rich.text import Text

    from moetune.report.lists import store_table
    from moetune.store.profile import Profile
    from moetune.store.store import Store

    folder = Store(store)
    found = list(folder.profiles())
    profiles = [(path, entry) for path, entry in found if isinstance(entry, Profile)]
    broken = [(path, entry) for path, entry in found if not isinstance(entry, Profile)]
    if as_json:
        document(
            {
                "schema_version": SCHEMA_VERSION,
                "store": str(folder.root),
                "shared": [str(root) for root in folder.shared],
                "profiles": [
                    {"path": str(path), "packaged": folder.is_packaged(path), **_summary(profile)}
                    for path, profile in profiles
                ],
                "unreadable": [{"path": str(path), "reason": str(error)} for path, error in broken],
            }
        )
        return
    files = not on_terminal()
    for root in folder.roots:
        within = [entry for entry in profiles if entry[0].is_relative_to(root)]
        if within:
            show(*([] if root == folder.root else [""]), root_line(folder, root))
            show("", store_table(within, root, files=files))
        elif root == folder.root:
            show(f"The store {root} has no profile yet. `moetune tune` writes one.")
    if profiles:
        show("", Text("buckets: those measured of those that the ladder has", style="dim"))
    if profiles and not files:
        links = "The regimes are links to the files; `moetune store list | cat` prints their paths."
        show(Text(links, style="dim"))
    show(*(Text.assemble(("unreadable", "yellow"), f" {error}", no_wrap=True) for _, error in broken))


def _summary(profile: Profile) -> dict[str, Any]:
    return {
        "layer": profile.layer.model_dump(mode="json"),
        "regime": profile.regime.model_dump(mode="json"),
        "backend": profile.backend,
        "environment": profile.environment.model_dump(mode="json"),
        "buckets": [choice.rows for choice in profile.choices],
        "missing_buckets": sorted(set(profile.regime.buckets) - {choice.rows for choice in profile.choices}),
        "measured_at": max((choice.measured_at for choice in profile.choices), default=None),
    }
