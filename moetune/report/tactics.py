"""How tactics read: in the columns of a table, on a line, and in few words why some were left out. Pure, no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from moetune.spec.tactic import Tactic

_TILE = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K")
_TILE_TITLE = "M×N×K"
_TITLES = {"GROUP_SIZE_M": "group", "num_warps": "warps", "num_stages": "stages"}
"""The tunables of vLLM's and SGLang's grouped GEMM have long names; every other kernel's are shown as they are."""


def tactic_line(tactic: Tactic) -> str:
    """`16×64×128 group=1 warps=4 stages=4`, `gemm1=12 gemm2=61`, or the one value alone: `grouped_mm`."""
    parts = _parts(tactic)
    if len(parts) == 1:
        return next(iter(parts.values()))
    return " ".join(value if title == _TILE_TITLE else f"{title}={value}" for title, value in parts.items())


def tactic_columns(tactics: Sequence[Tactic]) -> dict[str, list[str]]:
    """Titles and cells: a column for each value where all tactics have the same names, else one of `tactic_line`s."""
    parts = [_parts(tactic) for tactic in tactics]
    if len({frozenset(each) for each in parts}) == 1 and len(parts[0]) > 1:
        return {title: [each[title] for each in parts] for title in parts[0]}
    return {"tactic": [tactic_line(tactic) for tactic in tactics]}


def reasons_counted(groups: Sequence[Iterable[str]]) -> dict[str, list[int]]:
    """How often each kind of reason is given in each group, the most frequent kind first.

    What differs within a kind becomes `…`: `needs 248 bytes, has 64` and `needs 512 bytes, has 64` are both
    `needs … bytes, has 64`, whatever tactics they name.
    """
    kinds: dict[str, list[tuple[int, list[str]]]] = {}
    for group, reasons in enumerate(groups):
        for reason in reasons:
            unnamed = re.sub(r"\w+=\S+(?: \w+=\S+)*", "…", reason)
            kinds.setdefault(_masked(unnamed), []).append((group, unnamed.split(" ")))
    counted = {}
    for given in sorted(kinds.values(), key=len, reverse=True):
        found = Counter(group for group, _ in given)
        words = zip(*(words for _, words in given), strict=True)
        counted[" ".join(map(_alike, words))] = [found[group] for group in range(len(groups))]
    return counted


def _parts(tactic: Tactic) -> dict[str, str]:
    values = {name: str(value) for name, value in tactic.items()}
    if not all(name in values for name in _TILE):
        return values
    tile = {_TILE_TITLE: "×".join(values.pop(name) for name in _TILE)}
    return tile | {_TITLES.get(name, name): value for name, value in values.items()}


def _alike(words: Sequence[str]) -> str:
    return words[0] if len(set(words)) == 1 else _masked(words[0])


def _masked(text: str) -> str:
    return re.sub(r"\d[\d.,]*", "…", text)
