"""Defines the command `moetune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Argument, Command
from moetune.cli.options import device_option, json_option, store_option
from moetune.cli.output import document, line, show
from moetune.errors import MissError, UsageError

if TYPE_CHECKING:
    from moetune.store.match import Match
    from moetune.store.store import Store

NEAR = "near"
EXAMPLE = """\
moetune compare old.json new.json
moetune compare near new.json --measure"""


@click.command(cls=Command, example=EXAMPLE)
@click.argument("a", cls=Argument, metavar="A", meaning="A profile's file, or near. Usually the older one.")
@click.argument("b", cls=Argument, metavar="B", meaning="The other profile's file, or near.")
@click.option(
    "--measure",
    is_flag=True,
    help="Time both tactics of each bucket that differs, in turns, at each row count of the bucket. Needs the "
    "profiles' device, and one load and one kernel for both.",
)
@device_option
@store_option
@json_option
def compare(a: str, b: str, measure: bool, device: str | None, store: Path | None, as_json: bool) -> None:
    """Say what differs between two profiles of one layer, and what it costs.

    A and B are files. One of them may be the word near: the stored profile that differs from the other in versions
    only, such as the one from before an upgrade. Without --measure the answer comes from the records, and needs no GPU.

    The exit code is 0, whether they differ or not; 2 if their layers do.
    """
    from moetune.store.store import Store
    from moetune.tuning.changes import changes

    if device is not None and not measure:
        raise UsageError("--device names where --measure runs, and nothing is measured.", "Add --measure.")
    one, other = _both(a, b, Store(store))
    found = changes(one.profile, other.profile, str(one.path), str(other.path))
    if measure:
        from moetune.backends import registry
        from moetune.cli.streams import stdout_on_stderr
        from moetune.measure.probe import device_for
        from moetune.tuning.timed_changes import require_measurable, timed

        backend = registry.of_environment(one.profile.backend, one.profile.environment.strict)
        here = device_for(device)
        require_measurable(found, one.profile, other.profile, backend, here)
        with stdout_on_stderr():
            found = timed(found, one.profile, backend, here, on_bucket=_say)
    if as_json:
        document(found)
    else:
        from moetune.report.changes import changes_report

        show(*changes_report(found))


def _say(rows: int, index: int, count: int) -> None:
    line(f"[{index + 1}/{count}] {rows} rows", err=True)


def _both(a: str, b: str, store: Store) -> tuple[Match, Match]:
    """Returns the two profiles.

    Raises:
        UsageError: both are `near`, or there is no such file.
        MissError: one is `near`, and no other stored profile differs from the other one in versions only.
        StoreError: a file is no profile.
    """
    if a == b == NEAR:
        raise UsageError("A and B are both near: near what?", "Give a profile's path for one of them.")
    if a == NEAR:
        other = _read(b, store)
        return _near(other, store), other
    one = _read(a, store)
    return one, _near(one, store) if b == NEAR else _read(b, store)


def _read(given: str, store: Store) -> Match:
    from moetune.store.match import Match

    return Match(Path(given), store.read(given))


def _near(other: Match, store: Store) -> Match:
    from moetune.store.key import Key
    from moetune.store.match import nearest_match
    from moetune.store.profile import Profile

    rest = (
        (path, profile)
        for path, profile in store.profiles()
        if isinstance(profile, Profile) and path.resolve() != other.path.resolve()
    )
    found = nearest_match(Key.of(other.profile), rest)
    if found is None:
        raise MissError(
            f"No other stored profile differs from {other.path} in versions only.",
            "Give the path of a profile; `moetune store list` shows them.",
        )
    return found
