"""Estimates how long questions take, from the dates in stored profiles."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import pairwise

from moetune.store.profile import Profile

NEWEST = 10
"""How many profiles are looked at, the newest first: a tune of an older moetune took another time."""
PAUSE_S = 120.0
"""Two choices further apart than this were not measured one after the other: the tune was interrupted."""


def recorded_s(profiles: Iterable[Profile], backend: str, device: str) -> float | None:
    """Returns the mean time of a bucket in s, by the dates of the choices in stored profiles.

    Args:
        profiles: the stored profiles, also the packaged ones.
        backend: the backend that was tuned.
        device: the device. If no profile is of it, all devices count.

    Returns:
        The time; None if no profile of the backend has two choices made one after the other.
    """
    of_backend = sorted(
        (profile for profile in profiles if profile.backend == backend and profile.choices), key=_latest, reverse=True
    )
    of_device = [profile for profile in of_backend if profile.environment.device == device]
    for of in (of_device, of_backend):
        if gaps := [gap for profile in of[:NEWEST] for gap in _gaps_s(profile)]:
            return sum(gaps) / len(gaps)
    return None


def wall_s(costs_s: Iterable[float], devices: int) -> float:
    """Returns how long questions take on several devices, if each one takes the next question when it is free.

    Args:
        costs_s: how long each question takes, in their order.
        devices: the number of devices, at least one.
    """
    free = [0.0] * devices
    for cost in costs_s:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def _latest(profile: Profile) -> datetime:
    return max(choice.measured_time for choice in profile.choices)


def _gaps_s(profile: Profile) -> Iterator[float]:
    times = sorted(choice.measured_time for choice in profile.choices)
    for earlier, later in pairwise(times):
        if (gap := (later - earlier).total_seconds()) <= PAUSE_S:
            yield gap
