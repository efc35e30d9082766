"""Writes the command that tunes a profile again."""

from __future__ import annotations

from shlex import quote

from moetune.errors import MoetuneError
from moetune.inputs import dispatcher
from moetune.inputs.presets import names, preset, read
from moetune.spec.regime import Regime
from moetune.store.profile import Profile


def produced(profile: Profile, dispatch: str) -> Regime | None:
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
    default = Regime(distribution=regime.distribution, also=regime.also)
    if dispatch and (made := produced(profile, dispatch)) is not None:
        default = default.model_copy(update={"ladder": made.ladder})
    words = ["moetune tune", f"--model {quote(layer.name)}"]
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
    words += [f"--distribution {quote(regime.distribution)}"] if regime.distribution != Regime().distribution else []
    words += [f"--also {quote(each)}" for each in regime.also]
    words += [f"--objective {regime.objective}"] if regime.objective not in (None, "mean") else []
    for field in ("redundant_experts", "seed", "draws", "ladder", "tune_max_num_tokens"):
        value = getattr(regime, field)
        if value != getattr(default, field):
            words.append(f"--{field.replace('_', '-')} {value}")
    return " ".join([*words, f"--backend {quote(profile.backend)}"])


def whole_command(profile: Profile) -> str:
    """Returns `command` with the rank, and with the kernel's options if they are not the defaults."""
    regime, strict = profile.regime, profile.environment.strict
    words = [command(profile)]
    words += [f"--rank {regime.rank}"] if regime.ep_size > 1 and any(part.skew for part in regime.parts) else []
    kernel, remote = strict.get("kernel", "builtin"), strict.get("remote", "drop")
    words += [f"--kernel {quote(kernel)}"] if kernel != "builtin" else []
    words += [f"--remote {remote}"] if (kernel == "sglang") != (remote == "zero") else []
    return " ".join(words)


def can_ask(profile: Profile) -> bool:
    """Returns whether `whole_command` asks for the profile's layer and regime on any machine.

    It does not if the layer is no preset, if an engine's balancer places redundant experts, or if a recording is
    replayed.
    """
    layer, regime = profile.layer, profile.regime
    if layer.name not in names() or regime.eplb or regime.recordings:
        return False
    try:
        return layer == read(layer.name, layer.precision).layer
    except MoetuneError:
        return False
