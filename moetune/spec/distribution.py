"""Reads the spelling of a distribution, such as `random`, `ddist:2` or `replay:traffic.npz`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from moetune.errors import UsageError
from moetune.quoting import quoted
from moetune.spec.enums import DISTRIBUTIONS, REPLAY, SKEWED_DISTRIBUTIONS

SkewKind = Literal["ddist", "zipf", "powerlaw"]
_RANGES: dict[SkewKind, tuple[float, bool, str]] = {
    "ddist": (1.0, True, "a number from 1 on, such as ddist:2"),
    "zipf": (0.0, True, "a number from 0 on, such as zipf:1"),
    "powerlaw": (0.0, False, "a number above 0, such as powerlaw:1.2 (equal loads are spelled balanced)"),
}
"""The least parameter of each kind, whether it is allowed itself, and the words of the error."""
_REPLAY: Final = "replay:"
_DIGEST: Final = re.compile(r"[0-9a-f]{16}")
_LAYER: Final = re.compile(r"(?s)(.+)@([0-9]{1,6})")
MOST_ALSO: Final = 16
"""The most further distributions of one regime."""
LEAST_WEIGHT: Final = 1e-9
"""The least weight that the further distributions leave."""
_MOST_PATH: Final = 4_096
"""The longest path in characters, as Linux has it."""


@dataclass(frozen=True, slots=True)
class Skew:
    """A skewed distribution: its kind and its parameter. `workload/skew.py` defines the shares of the experts."""

    kind: SkewKind
    parameter: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.parameter:.12g}"


@dataclass(frozen=True, slots=True)
class Replay:
    """A recording of routed tokens, which takes the router's place.

    Attributes:
        source: the recording's digest, or the path of its file or folder. Keys and stored profiles have the digest.
        layer: the recorded layer, if a path has one: `replay:PATH@LAYER`. None pools all layers.
    """

    source: str
    layer: int | None = None

    def __str__(self) -> str:
        return f"{_REPLAY}{self.source}" + ("" if self.layer is None else f"@{self.layer}")

    @property
    def digest(self) -> str | None:
        """Returns the digest; None if the source is a path, which has still to be read."""
        return self.source if self.layer is None and _DIGEST.fullmatch(self.source) else None


def parse_distribution(spelled: object, source: str = "distribution") -> str:
    """Returns the canonical spelling of a distribution; case is ignored, and `ddist_2` is `ddist:2`, as in FlashInfer.

    The path of a recording keeps its case, and is not read here.

    Raises:
        UsageError: there is no such distribution, or its parameter is out of range. The message names `source` and
            lists the allowed values.
    """
    plain = str(spelled).strip()
    text = plain.lower()
    if text in DISTRIBUTIONS:
        return text
    if text.startswith(_REPLAY):
        return str(_replay(plain[len(_REPLAY) :].strip(), source, spelled))
    kind, _, parameter = text.replace("ddist_", "ddist:", 1).partition(":")
    for known in get_args(SkewKind):
        if kind == known:
            return str(Skew(known, _parameter(known, parameter, source, spelled)))
    allowed = ", ".join((*DISTRIBUTIONS, *SKEWED_DISTRIBUTIONS, REPLAY))
    raise UsageError(f"{source} must be one of {allowed}; given {quoted(spelled)}.")


def skew_of(distribution: str) -> Skew | None:
    """Returns the skew that a canonical spelling names; None for `random`, `balanced` and recordings."""
    kind, colon, parameter = distribution.partition(":")
    for known in get_args(SkewKind):
        if colon and kind == known:
            return Skew(known, float(parameter))
    return None


def replay_of(distribution: str) -> Replay | None:
    """Returns the recording that a canonical spelling names; None for all other distributions."""
    if not distribution.startswith(_REPLAY):
        return None
    return _replay(distribution[len(_REPLAY) :], "distribution", distribution)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A distribution and its weight among those of a regime."""

    distribution: str
    weight: float

    def __str__(self) -> str:
        return f"{self.distribution}={self.weight:.12g}"


def parse_weighted(spelled: object, source: str = "also") -> Weighted:
    """Reads `DISTRIBUTION=WEIGHT`, such as `zipf:1=0.3`.

    Raises:
        UsageError: there is no such distribution, or the weight is not between 0 and 1.
    """
    distribution, equals, text = str(spelled).strip().rpartition("=")
    try:
        weight = float(text) if equals else math.nan
    except ValueError:
        weight = math.nan
    if not 0 < weight < 1:
        raise UsageError(
            f"{source} takes a distribution and its weight between 0 and 1, such as zipf:1=0.3. "
            f"Given: {quoted(spelled)}."
        )
    return Weighted(parse_distribution(distribution, source), float(f"{weight:.12g}"))


def parse_also(spelled: object) -> tuple[str, ...]:
    """Returns the canonical spellings of further distributions with their weights, in an order that does not depend on
    the given one.

    Args:
        spelled: one text or several, as `parse_weighted` reads them.

    Raises:
        UsageError: as `parse_weighted`, or there are more than `MOST_ALSO`.
    """
    given = [spelled] if isinstance(spelled, str) or not isinstance(spelled, Iterable) else list(spelled)
    if len(given) > MOST_ALSO:
        raise UsageError(f"also takes at most {MOST_ALSO} distributions, given {len(given):,}.")
    return tuple(sorted(str(parse_weighted(each)) for each in given))


def weighted(distribution: str, also: Sequence[str]) -> tuple[Weighted, ...]:
    """Returns all distributions of a regime with their weights, the main one first. It has what the others leave.

    Raises:
        UsageError: a distribution is named twice, or the others leave nothing.
    """
    others = [parse_weighted(each) for each in also]
    names = [distribution, *(each.distribution for each in others)]
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise UsageError(
            f"The distribution {twice[0]} is given twice.",
            "Name each distribution once: one as distribution, the others in also.",
        )
    rest = 1 - math.fsum(each.weight for each in others)
    if rest < LEAST_WEIGHT:
        raise UsageError(
            f"The weights of also leave nothing for the distribution {distribution}: they add up to {1 - rest:.6g}.",
            "Give weights that add up to less than 1.",
        )
    return Weighted(distribution, float(f"{rest:.12g}")), *others


def _replay(source: str, named: str, spelled: object) -> Replay:
    if not source or len(source) > _MOST_PATH or "\0" in source:
        raise UsageError(
            f"{named} replay takes the path of a recording, or of one layer of it: replay:PATH or replay:PATH@LAYER. "
            f"Given: {quoted(spelled)}."
        )
    of_layer = _LAYER.fullmatch(source)
    return Replay(of_layer[1], int(of_layer[2])) if of_layer else Replay(source)


def _parameter(kind: SkewKind, text: str, source: str, spelled: object) -> float:
    least, included, words = _RANGES[kind]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least or (value == least and not included):
        raise UsageError(f"{source} {kind} takes {words}. Given: {quoted(spelled)}.")
    return value + 0.0  # −0 is 0
