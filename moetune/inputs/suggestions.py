"""Suggests known names for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

MOST_COMPARED: Final = 100
"""The characters of a name that are compared: the time grows with their square."""

MOST_BEHIND: Final = 0.05
"""How much less similar than the nearest a name may be that is suggested too."""


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns `Did you mean a, b or c?` with the known names closest to `given`; empty if none is close.

    Names that contain `given` come first. Case is ignored. At most four are suggested, none much less similar than the
    nearest.
    """
    names, given = {name.lower(): name for name in known}, given[:MOST_COMPARED].lower()
    containing = [name for name in names if given and given in name]
    similar = difflib.get_close_matches(given, names, n=4, cutoff=cutoff)
    ratios = {name: _ratio(given, name) for name in dict.fromkeys([*containing, *similar])}
    if not ratios:
        return ""
    found = [name for name, ratio in ratios.items() if ratio >= max(ratios.values()) - MOST_BEHIND][:4]
    *first, last = (names[name] for name in found)
    return f"Did you mean {', '.join(first)} or {last}?" if first else f"Did you mean {last}?"


def _ratio(given: str, name: str) -> float:
    return difflib.SequenceMatcher(None, given, name[:MOST_COMPARED]).ratio()
