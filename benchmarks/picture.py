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

from moetune.errors import MoetuneError
from moetune.inputs import dispatcher
from moetune.inputs.presets import names, preset
from moetune.report.profile import profile_report
from moetune.spec.regime import Regime
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
        produced = _produced(profile, name)
        if profile.regime.dispatch != "none" and produced and profile.regime in (produced, produced.coarser):
            return name
    return ""


def _produced(profile: Profile, dispatch: str) -> Regime | None:
    """Returns the profile's regime with all that a dispatcher sets; None if the dispatcher does not fit."""
    layer, regime = profile.layer, profile.regime
    ladder = {"ladder", "tune_max_num_tokens"}
    try:
        produced = dispatcher.resolve(
            dispatch, layer, regime.ep_size, regime.redundant_experts, regime.attention_dp, regime.tp_size
        )
        return Regime(**{**regime.model_dump(exclude=ladder | {"uneven_shards"}), **produced})
    except MoetuneError:
        return None


def command(profile: Profile, dispatch: str = "") -> str:
    """Returns the `moetune tune` command that tunes the profile, without options that have their default values.

    Args:
        profile: the profile to tune.
        dispatch: an engine's dispatcher that produces the profile's load, which replaces four options.
    """
    layer, regime = profile.layer, profile.regime
    default = Regime(distribution=regime.distribution)
    if dispatch and (produced := _produced(profile, dispatch)) is not None:
        default = default.model_copy(update={"ladder": produced.ladder})
    words = ["moetune tune", f"--model {layer.name}"]
    if layer.name in names() and layer.precision != preset(layer.name).precision:
        words.append(f"--precision {layer.precision}")
    words += [f"--ep {regime.ep_size}"] if regime.ep_size > 1 else []
    words += [f"--tp {regime.tp_size}"] if regime.tp_size > 1 else []
    if dispatch:
        words.append(f"--dispatch {dispatch}")
    else:
        words += ["--dp"] if regime.attention_dp else []
        words += [f"--dispatch {regime.dispatch}"] if regime.dispatch == "allgather" else []
        words += [f"--layout {regime.layout}"] if regime.layout not in (None, "packed") else []
    words += [f"--distribution {regime.distribution}"] if regime.distribution != Regime().distribution else []
    for field in ("redundant_experts", "seed", "draws", "ladder", "tune_max_num_tokens"):
        value = getattr(regime, field)
        if value != getattr(default, field):
            words.append(f"--{field.replace('_', '-')} {value}")
    return " ".join([*words, f"--backend {profile.backend}"])


if __name__ == "__main__":
    main()
