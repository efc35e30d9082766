"""The error of a look-up that found no profile. It names the nearest profile and the fields in which it differs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from moetune.errors import Difference, MissError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.key import Key
from moetune.store.match import Match
from moetune.store.profile import Profile
from moetune.store.versions import DEPLOYED, KERNEL_FIELDS, versions_of

HINT = "Run `moetune tune` with the same options to measure it."
NEAR_HINT = (
    "Run `moetune tune --start near` with the same options to check its tactics here in seconds, or give --near to use "
    "it as it is."
)
_DEVICE = frozenset({"device", "compute_capability", "cpu", "threads"})
"""The fields of the environment that belong to the device."""
FIELD_TITLES: Final[Mapping[str, str]] = {
    "ep_size": "ep",
    "tp_size": "tp",
    "redundant_experts": "redundant experts",
    "also": "further distributions",
    "remote": "--remote",
    "tune_max_num_tokens": "largest bucket",
}
"""What a reader calls a field that deployments differ in, if that is not its name."""


def miss(key: Key, profiles: Iterable[tuple[Path, Profile]], root: Path, near: Match | None = None) -> MissError:
    """Returns the error for a key that no profile matches.

    The nearest profile is the near one if there is one. Otherwise it has the fewest differences, and of those the
    nearest EP and TP sizes. A profile of the same layer is always nearer than one of another, and of these one of the
    same backend. The message names every difference that keeps the profile from being used.

    Args:
        key: the key that was looked up.
        profiles: all profiles of the store, with their files.
        root: the store's folder.
        near: the nearest profile, if it differs in versions only.
    """
    no_profile = f"No profile of {key.layer.name} under {key.regime.slug} by {key.backend} on {key.environment.device}."
    if near is not None:
        changing = [each for each in near.differences if each.field in near.near]
        message = f"{no_profile} The nearest has {_named(changing)}."
        return MissError(message, NEAR_HINT, near.differences, near.path, near=True)
    found = [(path, profile, key.other_differences(profile) or key.differences(profile)) for path, profile in profiles]
    if not found:
        return MissError(f"{no_profile} The store {root} is empty.", HINT)
    path, nearest, differences = min(
        found,
        key=lambda entry: (
            entry[1].layer.shape != key.layer.shape,
            entry[1].backend != key.backend,
            len(entry[2]),
            _distance(key.regime, entry[1].regime),
            str(entry[0]),
        ),
    )
    deciding = _deciding(key, nearest, differences)
    said = [f"is of {nearest.layer.name}"] if _other_layer(key, nearest) else []
    if nearest.environment.device == key.environment.device:
        said += [f"has {_named(deciding)}"] if deciding else []
        message = f"{no_profile} The nearest {' and '.join(said) or 'has no bucket'}."
    else:
        said += [f"was measured with {nearest.backend} on {nearest.environment.device}"]
        message = f"No profile for {key.environment.device}. The nearest {' and '.join(said)}."
        others = {"backend", *nearest.environment.strict, *key.environment.strict} - KERNEL_FIELDS
        if its := [each for each in deciding if each.field not in others]:
            message += f" It has {_named(its)}."
    return MissError(message, HINT, differences, path, taken_with=_taken_with(key, nearest, differences))


def _deciding(key: Key, nearest: Profile, differences: Iterable[Difference]) -> list[Difference]:
    """Returns the differences that keep a profile from being used, except those that follow from others.

    The sizes of another layer, the kernel and the versions of another backend, and what belongs to another device.
    """
    left_out = {*versions_of(key.backend).neutral}
    left_out |= {*MoELayer.model_fields} if _other_layer(key, nearest) else set()
    left_out |= set() if nearest.environment.device == key.environment.device else _DEVICE
    left_out |= set() if nearest.backend == key.backend else {*key.environment.strict, *nearest.environment.strict}
    return [each for each in differences if each.field not in left_out and not _is_unknown(each)]


def _is_unknown(difference: Difference) -> bool:
    """Returns whether a difference is in a version of another machine, which nobody knows here."""
    return difference.wanted is None and difference.field in DEPLOYED


def _other_layer(key: Key, nearest: Profile) -> bool:
    """Returns whether a profile is of another layer, with another name. Else single sizes or the precision differ."""
    return key.layer.shape != nearest.layer.shape and key.layer.name != nearest.layer.name


def _taken_with(key: Key, nearest: Profile, differences: Iterable[Difference]) -> tuple[str, ...]:
    """Returns the options of `moetune show` with which a look-up takes the nearest profile; empty if none do.

    They can name the device if it is a GPU and the key's is a CPU, the ladder, the largest bucket, and `--near`.
    """
    fields = {each.field for each in differences if not _is_unknown(each)} - versions_of(key.backend).neutral
    options: list[str] = []
    if fields & _DEVICE and "cpu" in key.environment.strict and "cpu" not in nearest.environment.strict:
        options += ["--device-name", nearest.environment.device]
        fields -= _DEVICE | DEPLOYED
    regime = nearest.regime
    if "ladder" in fields:
        options += ["--ladder", str(regime.ladder)]
    if "tune_max_num_tokens" in fields:
        options += ["--tune-max-num-tokens", str(regime.tune_max_num_tokens)]
    if near := fields & versions_of(key.backend).near:
        options += ["--near"]
    return () if fields - near - {"ladder", "tune_max_num_tokens"} else tuple(options)


def taken_hint(options: Sequence[str]) -> str:
    """Returns a sentence with the options that `_taken_with` has found; empty if there are none."""
    return f"`moetune show` and `moetune export` take the nearest with {shlex.join(options)}." if options else ""


def _distance(one: Regime, other: Regime) -> float:
    """Returns how far apart two deployments' sizes are: the logarithms of their quotients."""
    return abs(math.log(one.ep_size / other.ep_size)) + abs(math.log(one.tp_size / other.tp_size))


def _named(differences: Sequence[Difference]) -> str:
    named = [
        f"{FIELD_TITLES.get(each.field, each.field)} {'none' if each.stored is None else each.stored} instead of "
        f"{'none' if each.wanted is None else each.wanted}"
        for each in differences
    ]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
