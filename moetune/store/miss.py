"""The error of a look-up that found no profile. It names the closest profile and the fields in which it differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from moetune.errors import Difference, MissError
from moetune.spec.regime import Regime
from moetune.store.key import Key
from moetune.store.match import Match
from moetune.store.profile import Profile
from moetune.store.versions import KERNEL_FIELDS

HINT = "Run `moetune tune` with the same options to measure it."
NEAR_HINT = (
    "Run `moetune tune --start near` with the same options to check its tactics here in seconds, or give --near to use "
    "it as it is."
)
NAMED = 3
"""Number of differences that the message names; all are in `MissError.differences`."""
FIELD_TITLES: Final[Mapping[str, str]] = {
    "ep_size": "ep",
    "tp_size": "tp",
    "redundant_experts": "redundant experts",
    "remote": "--remote",
    "tune_max_num_tokens": "largest bucket",
}
"""What a reader calls a field that deployments differ in, if that is not its name."""


def miss(key: Key, profiles: Iterable[tuple[Path, Profile]], root: Path, near: Match | None = None) -> MissError:
    """Returns the error for a key that no profile matches.

    The closest profile is the near one if there is one. Otherwise it has the fewest differences, and of those the
    nearest EP and TP sizes. A profile of the same layer is always closer than one of another, and of these one of the
    same backend.

    Args:
        key: the key that was looked up.
        profiles: all profiles of the store, with their files.
        root: the store's folder.
        near: the nearest profile, if it differs in versions only.
    """
    no_profile = f"No profile of {key.layer.name} under {key.regime.slug} by {key.backend} on {key.environment.device}."
    if near is not None:
        changing = tuple(each for each in near.differences if each.field in near.near)
        message = f"{no_profile} The closest has {_named(changing)}."
        return MissError(message, NEAR_HINT, near.differences, near.path, near=True)
    found = [(path, profile, key.other_differences(profile) or key.differences(profile)) for path, profile in profiles]
    if not found:
        return MissError(f"{no_profile} The store {root} is empty.", HINT)
    path, closest, differences = min(
        found,
        key=lambda entry: (
            entry[1].layer.shape != key.layer.shape,
            entry[1].backend != key.backend,
            len(entry[2]),
            _distance(key.regime, entry[1].regime),
            str(entry[0]),
        ),
    )
    if closest.environment.device == key.environment.device:
        message = f"{no_profile} The closest has {_named(differences)}."
    else:
        of = "" if closest.layer.shape == key.layer.shape else f", of {closest.layer.name},"
        torch = closest.environment.strict.get("torch")
        versions = ", ".join([f"backend {closest.backend}", *([f"torch {torch}"] if torch else [])])
        message = (
            f"No profile for {key.environment.device}. "
            f"The closest{of} was measured on {closest.environment.device} ({versions})."
        )
        named = {*Regime.model_fields, *(KERNEL_FIELDS if closest.backend == key.backend else ())}
        deployment = tuple(each for each in differences if each.field in named)
        if closest.layer.shape == key.layer.shape and deployment:
            message += f" It has {_named(deployment)}."
    return MissError(message, HINT, differences, path)


def _distance(one: Regime, other: Regime) -> float:
    """Returns how far apart two deployments' sizes are: the logarithms of their quotients."""
    return abs(math.log(one.ep_size / other.ep_size)) + abs(math.log(one.tp_size / other.tp_size))


def _named(differences: tuple[Difference, ...]) -> str:
    named = [
        f"{FIELD_TITLES.get(each.field, each.field)} {'none' if each.stored is None else each.stored} instead of "
        f"{'none' if each.wanted is None else each.wanted}"
        for each in differences[:NAMED]
    ]
    if (more := len(differences) - NAMED) > 0:
        named.append(f"{more} other difference{'s' if more > 1 else ''}")
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
