"""Finds out whether a GPU was slowed down by heat or by its power supply while it was measured.

A GPU at its ordinary power limit is not reported: most are there while they are tuned, and interleaved timing copes.
The fields are nvidia-smi's. Newer drivers count the µs of each reason. Others say only which reasons are active, as the
bit mask of NVML's `nvmlClocksEventReasons`, so what was over before the end of a tune is not found there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from moetune.measure.probe import queried

COUNTERS: Final[Mapping[str, str]] = {
    "sw_thermal_slowdown": "software thermal slowdown",
    "hw_thermal_slowdown": "hardware thermal slowdown",
    "hw_power_brake_slowdown": "power brake",
}
MASKS: Final = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The names of the bit mask, newer drivers' first."""
BITS: Final[Mapping[int, str]] = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
LEAST_S: Final = 0.1
"""Less slowdown in a whole tune is not reported."""


@dataclass(frozen=True, slots=True)
class Throttling:
    """What a GPU says of its slowdowns at one moment.

    Attributes:
        counted_us: for how long each reason was active since the driver was loaded, in µs; empty if it is not counted.
        active: the reasons that are active, if they are not counted.
    """

    counted_us: Mapping[str, float] = field(default_factory=dict)
    active: frozenset[str] = frozenset()

    def since(self, before: Throttling) -> tuple[str, ...]:
        """Returns each reason that slowed the GPU down since `before`, with for how long where that is counted."""
        seconds = {
            reason: (us - before.counted_us[reason]) / 1e6
            for reason, us in self.counted_us.items()
            if reason in before.counted_us
        }
        counted = tuple(f"{reason} for {each:.1f} s" for reason, each in seconds.items() if each >= LEAST_S)
        return counted or tuple(sorted(self.active | before.active))


def throttling(device: str) -> Throttling:
    """Returns what a GPU says of its slowdowns; nothing for a CPU, or where nvidia-smi does not answer.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
    """
    if not device.startswith("cuda"):
        return Throttling()
    import torch

    return of_gpu(str(torch.cuda.get_device_properties(device).uuid))


def of_gpu(uuid: str) -> Throttling:
    """Returns what the GPU with this UUID says of its slowdowns; nothing where nvidia-smi does not answer."""
    counted = dict(zip(COUNTERS.values(), queried(uuid, _counter_fields()), strict=False))
    counted_us = {reason: us for reason, text in counted.items() if (us := _number(text)) is not None}
    if counted_us:
        return Throttling(counted_us)
    for name in MASKS:
        (text, *_) = queried(uuid, [name]) or ("",)
        try:
            mask = int(text, 16)
        except ValueError:
            continue
        return Throttling(active=frozenset(reason for bit, reason in BITS.items() if mask & bit))
    return Throttling()


def _counter_fields() -> list[str]:
    return [f"clocks_event_reasons_counters.{name}" for name in COUNTERS]


def _number(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(1 << 64)) else None
