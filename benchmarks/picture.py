"""Draws docs/tune.svg, the README's picture, from a profile that `moetune tune` wrote.

    python benchmarks/picture.py profiles/NVIDIA_H200/e128-k8-h4096-*/ep8-tp1-dp-allgather-*/triton-*.json

Nothing is measured here: the table is the one that `moetune show PROFILE.json` prints. If an engine's dispatcher
produces the profile's load, the command in the picture names that dispatcher.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moetune.inputs import dispatcher
from moetune.report.profile import profile_report
from moetune.report.tune_command import command, produced
from moetune.store.profile import Profile
from moetune.store.store import Store

COLUMNS = 100
PICTURE = Path(__file__).parent.parent / "docs" / "tune.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="a profile in a store; `moetune store list` shows what there is")
    parser.add_argument("--output", type=Path, default=PICTURE, help="the SVG to write (default: %(default)s)")
    given = parser.parse_args()
    profile = Store().read(given.profile)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(picture(profile), encoding="utf-8")
    print(f"{given.output}: {len(profile.choices)} buckets of {profile.layer.name} on {profile.environment.device}")


def picture(profile: Profile) -> str:
    """Returns the SVG of a terminal that shows the command and the profile's report."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("$ ", style="dim").append(command(profile, dispatcher_of(profile)), style="bold"))
    for renderable in profile_report(profile):
        console.print(renderable)
    return console.export_svg(title="moetune")


def dispatcher_of(profile: Profile) -> str:
    """Returns the first engine's dispatcher that produces the profile's load, as `ENGINE:NAME`; empty if none does.

    The dispatcher has the profile's ladder, or one that the profile answers too.
    """
    for name in map(str, dispatcher.dispatchers()):
        made = produced(profile, name)
        if profile.regime.dispatch != "none" and made and profile.regime in (made, made.coarser):
            return name
    return ""


if __name__ == "__main__":
    main()
