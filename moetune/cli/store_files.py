"""Defines the commands `moetune store verify`, `merge` and `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Command
from moetune.cli.options import device_option, json_option, store_option
from moetune.cli.output import document, report, show
from moetune.errors import UsageError
from moetune.quoting import shown_path

if TYPE_CHECKING:
    from rich.text import Text

    from moetune.store.store import Store
    from moetune.store.verify import Verified

SCHEMA_VERSION = 1

apply_option = click.option("--apply", is_flag=True, help="Do it. Without it the command only says what it would do.")


@click.command(
    cls=Command, example="moetune store verify", short_help="Say which profiles this machine can use, and why not."
)
@store_option
@device_option
@json_option
def verify(store: Path | None, device: str | None, as_json: bool) -> None:
    """Say of every profile file whether it matches this machine exactly, is near, or why it cannot be used here.

    Only the device and the versions are compared, not the deployment. Nothing is changed. If a file is damaged or
    cannot be read, the exit code is 1.
    """
    from moetune.report.store import verified_line, verified_table
    from moetune.store.store import Store
    from moetune.store.verify import BROKEN

    folder = Store(store)
    found = _verified(folder, device)
    if as_json:
        files = [
            {
                "path": str(file.path),
                "packaged": folder.is_packaged(file.path),
                "state": file.state.value,
                "why": file.why,
                "differing": {each.field: each.plain() for each in file.differences},
            }
            for file in found
        ]
        document({"schema_version": SCHEMA_VERSION, **_folders(folder), "files": files})
    elif not found:
        show(f"The store {folder.root} has no profile yet. `moetune tune` writes one.")
    else:
        for root in folder.roots:
            if within := [file for file in found if file.path.is_relative_to(root)]:
                show(root_line(folder, root), "", verified_table(within, root), "")
        show(f"{len(found)} file{'s' if len(found) > 1 else ''}: {verified_line(found)}")
    if any(file.state in BROKEN for file in found):
        click.get_current_context().exit(1)


@click.command(
    cls=Command,
    example="moetune store merge /mnt/other/moetune --apply",
    short_help="Merge the profiles of other machines' stores into the store.",
)
@click.argument("others", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="OTHER...")
@apply_option
@store_option
@json_option
def merge(others: tuple[Path, ...], apply: bool, store: Path | None, as_json: bool) -> None:
    """Merge the profiles of other stores, such as copies of other machines' folders, into the store.

    Of two choices for one bucket the one that was measured later is taken, as when a tune saves. The other stores stay
    as they are. Without --apply nothing is written.
    """
    from moetune.report.store import merged_lines
    from moetune.store.merge import Merged, Skipped
    from moetune.store.merge import merge as merge_store
    from moetune.store.store import Store

    folder = Store(store)
    _require_others(others, folder)
    merged: list[Merged] = []
    skipped: list[Skipped] = []
    for other in others:
        count = len(merged) + len(skipped)
        for each in merge_store(folder, other, apply=apply):
            if isinstance(each, Skipped):
                skipped.append(each)
                continue
            merged.append(each)
            if not as_json and (each.changes or each.kept or each.note):
                show(*merged_lines(each))
        if len(merged) + len(skipped) == count:
            report(f"warning: {shown_path(other)} has no profile.")
    for file in skipped:
        report(f"warning: {file.path} is not merged: {file.reason}.")
    changed = sum(each.changes for each in merged)
    if as_json:
        document(
            {
                "schema_version": SCHEMA_VERSION,
                "store": str(folder.root),
                "applied": apply,
                "merged": [
                    {
                        "source": str(each.source),
                        "path": str(each.path),
                        "new": list(each.new),
                        "replaced": list(each.replaced),
                        "kept": list(each.kept),
                        "note": each.note,
                    }
                    for each in merged
                ],
                "skipped": [{"path": str(file.path), "reason": file.reason} for file in skipped],
            }
        )
    else:
        verb = "changed" if apply else "would change; give --apply to write them"
        show(f"{changed} of {len(merged)} profiles {verb}.")


@click.command(
    cls=Command,
    example="moetune store prune --apply",
    short_help="Delete the profiles that newer ones have replaced.",
)
@apply_option
@store_option
@device_option
@json_option
def prune(apply: bool, store: Path | None, device: str | None, as_json: bool) -> None:
    """Delete the profiles of other versions that one of exactly this machine's versions has replaced.

    Both answer the same question on this device, and the newer one has every bucket of the older one. Without --apply
    nothing is deleted. What cannot be read, is of another device or is being tuned always stays, and so do shared
    stores.
    """
    from moetune.store.prune import replaced
    from moetune.store.store import Store

    folder = Store(store)
    found = list(replaced(folder, _verified(folder, device)))
    deleted = [each for each in found if folder.delete(each.path, each.profile, each.by)] if apply else found
    if as_json:
        entries = [{"path": str(each.path), "replaced_by": str(each.by)} for each in deleted]
        document({"schema_version": SCHEMA_VERSION, "store": str(folder.root), "applied": apply, "profiles": entries})
        return
    for each in deleted:
        show(f"{'deleted' if apply else 'would delete'} {each.path}", f"  replaced by {each.by}")
    if not found:
        show(f"No profile of {folder.root} is replaced by another.")
    elif not apply:
        show(f"{len(found)} profile{'s' if len(found) > 1 else ''} would be deleted; give --apply to delete them.")
    elif len(deleted) < len(found):
        show(f"{len(found) - len(deleted)} stayed, because they have changed meanwhile.")


def _require_others(others: tuple[Path, ...], store: Store) -> None:
    for other in others:
        if not other.is_dir():
            raise UsageError(f"There is no store {shown_path(other)}: it is no folder.", "Give another store's folder.")
        if other.resolve() == store.root.resolve():
            raise UsageError(f"{shown_path(other)} is the store itself.", "Give another store's folder.")


def root_line(store: Store, root: Path) -> Text:
    """Returns a line that says what one of a store's folders is, and where."""
    from rich.text import Text

    what = "shared store, read-only" if root in store.shared else "packaged with moetune, read-only"
    return Text.assemble(("store" if root == store.root else what, "dim"), " ", (str(root), "cyan"), no_wrap=True)


def _folders(store: Store) -> dict[str, object]:
    return {"store": str(store.root), "shared": [str(root) for root in store.shared]}


def _verified(store: Store, device: str | None) -> list[Verified]:
    from moetune.measure.this_machine import environment_here
    from moetune.store import verify as verification

    return list(verification.verify(store, lambda profile: environment_here(profile, device)))
