"""Formats numbers for people."""

from __future__ import annotations

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
TIME_UNITS = ("µs", "ms", "s")
_SMALL_GAIN = 1.1


def significant(value: float) -> str:
    """Returns `value` with about three significant digits and separated thousands: `1,234`, `12.3`, `0.12`."""
    whole_digits = len(str(int(abs(value))))
    return f"{_half_up(value):,.{max(0, 3 - whole_digits)}f}"


def gain_digits(gain: float) -> int:
    """Returns the number of decimals of a gain and its bounds: 3 if it is small, where 2 would not show it."""
    return 3 if gain < _SMALL_GAIN else 2


def _half_up(value: float) -> float:
    """Returns `value`, a little larger, so that a half is rounded up: 0.125 to 0.13."""
    return value * (1 + 1e-9)


def count(value: float) -> str:
    """Returns a count, or a mean of counts: `128`, `8,192`, `12.5`, `0.031`."""
    if value == int(value) or value >= 100:
        return f"{round(value):,}"
    shown = _half_up(value)
    return f"{shown:.1f}" if value >= 10 else f"{shown:.2g}" if value < 0.1 else f"{shown:.2f}"


def human_bytes(value: float) -> str:
    """Returns bytes in decimal units: `15.4 kB`, `117 MB`."""
    return _scaled(value, BYTE_UNITS)


def human_flops(value: float) -> str:
    """Returns a number of floating-point operations in decimal units: `1.81 GFLOP`."""
    return _scaled(value, FLOP_UNITS)


def human_time(value_us: float) -> str:
    """Returns a time, given in µs, in a readable unit: `51.2 µs`, `4.21 ms`, `1.20 s`."""
    return _scaled(value_us, TIME_UNITS)


def duration(seconds: float) -> str:
    """Returns a rounded duration: `8 s`, `3 min`, `1 h 40 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    at = 0
    while value >= 999.5 and at < len(units) - 1:
        value, at = value / 1000, at + 1
    return f"{count(value) if isinstance(value, int) else significant(value)} {units[at]}"
