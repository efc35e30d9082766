"""Suggests known names for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

MOST_COMPARED: Final = 100
"""The characters of a name that are compared: the time grows with their square."""


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns `Did you mean a, b or c?` with the known names closest to `given`; empty if none is close.

    Names that contain `given` come first. At most four are suggested.
    """
    names, given = list(known), given[:MOST_COMPARED]
    containing = [name for name in names if given and given in name]
    similar = difflib.get_close_matches(given, names, n=4, cutoff=cutoff)
    found = list(dict.fromkeys([*containing, *similar]))[:4]
    if not found:
        return ""
    *first, last = found
    return f"Did you mean {', '.join(first)} or {last}?" if first else f"Did you mean {last}?"
