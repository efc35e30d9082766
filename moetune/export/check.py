"""Whether a backend lists a profile's tactics on this machine; torch is imported only where it can be asked."""

from __future__ import annotations

from pathlib import Path

from moetune.errors import UnsupportedError
from moetune.store.profile import Profile

DEVICES = Path("/dev")


def check(profile: Profile, device: str = "cuda") -> bool:
    """Looks up each choice's tactic in its backend's list, where the backend runs here as the profile says.

    Returns:
        Whether it was looked up: not without an NVIDIA device, or where the backend cannot run or is another version.

    Raises:
        UnsupportedError: the backend lists no such tactic.
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
    for choice in profile.choices:
        listed = backend.candidates(profile.layer, profile.regime, choice.rows, device).tactics
        if choice.tactic not in listed:
            raise UnsupportedError(
                f"{profile.backend} lists no tactic {choice.tactic} for {choice.rows} rows on this machine.",
                "Tune again here.",
            )
    return True
