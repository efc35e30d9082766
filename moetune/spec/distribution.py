"""Reads the spelling of a distribution, such as `random` or `ddist:2`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moetune.errors import UsageError
from moetune.quoting import quoted
from moetune.spec.enums import DISTRIBUTIONS, SKEWED_DISTRIBUTIONS

SkewKind = Literal["ddist", "zipf", "powerlaw"]
_RANGES: dict[SkewKind, tuple[float, bool, str]] = {
    "ddist": (1.0, True, "a number from 1 on, such as ddist:2"),
    "zipf": (0.0, True, "a number from 0 on, such as zipf:1"),
    "powerlaw": (0.0, False, "a number above 0, such as powerlaw:1.2 (equal loads are spelled balanced)"),
}
"""The least parameter of each kind, whether it is allowed itself, and the words of the error."""


@dataclass(frozen=True, slots=True)
class Skew:
    """A skewed distribution: its kind and its parameter. `workload/skew.py` defines the shares of the experts."""

    kind: SkewKind
    parameter: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.parameter:.12g}"


def parse_distribution(spelled: object, source: str = "distribution") -> str:
    """Returns the canonical spelling of a distribution; case is ignored, and `ddist_2` is `ddist:2`, as in FlashInfer.

    Raises:
        UsageError: there is no such distribution, or its parameter is out of range. The message names `source` and
            lists the allowed values.
    """
    text = str(spelled).strip().lower()
    if text in DISTRIBUTIONS:
        return text
    kind, _, parameter = text.replace("ddist_", "ddist:", 1).partition(":")
    for known in get_args(SkewKind):
        if kind == known:
            return str(Skew(known, _parameter(known, parameter, source, spelled)))
    allowed = ", ".join((*DISTRIBUTIONS, *SKEWED_DISTRIBUTIONS))
    raise UsageError(f"{source} must be one of {allowed}; given {quoted(spelled)}.")


def skew_of(distribution: str) -> Skew | None:
    """Returns the skew that a canonical spelling names; None for `random` and `balanced`."""
    kind, colon, parameter = distribution.partition(":")
    for known in get_args(SkewKind):
        if colon and kind == known:
            return Skew(known, float(parameter))
    return None


def _parameter(kind: SkewKind, text: str, source: str, spelled: object) -> float:
    least, included, words = _RANGES[kind]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least or (value == least and not included):
        raise UsageError(f"{source} {kind} takes {words}. Given: {quoted(spelled)}.")
    return value + 0.0  # −0 is 0
