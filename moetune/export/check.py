"""Checks that a backend lists a profile's tactics on this machine. Imports torch only if there is an NVIDIA device."""

from __future__ import annotations

from pathlib import Path

from moetune.errors import UnsupportedError
from moetune.store.profile import Profile

DEVICES = Path("/dev")


def check(profile: Profile, device: str = "cuda") -> bool:
    """Looks up each choice's tactic in the list of its backend.

    A tactic that was a default in the profile is not looked up. It can be a row of an engine's tuned file that is
    none of the backend's own tactics, so that the backend lists it at some row counts only.

    Returns:
        True if all were found. False if nothing was looked up: there is no NVIDIA device, or the backend cannot run
        here, or its version is not the profile's.

    Raises:
        UnsupportedError: the backend does not list a tactic.
    """
    if not any(DEVICES.glob("nvidia[0-9]*")):
        return False
    from moetune.backends import registry

    backend = registry.backend(profile.backend)
    if backend.unavailable() is not None:
        return False
    strict = profile.environment.strict
    if any(strict.get(name) != value for name, value in backend.environment().items()):
        return False
    defaults = {choice.default_tactic for choice in profile.choices}
    defaults |= {compared.default_tactic for choice in profile.choices for compared in choice.by_rows}
    for choice in profile.choices:
        listed = backend.candidates(profile.layer, profile.regime, choice.rows, device).tactics
        if choice.tactic not in listed and choice.tactic not in defaults:
            raise UnsupportedError(
                f"{profile.backend} lists no tactic {choice.tactic} for {choice.rows} rows on this machine.",
                "Run `moetune tune` again on this machine.",
            )
    return True
