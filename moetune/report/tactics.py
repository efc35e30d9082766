"""Formats tactics as a line or as columns, and counts the reasons why some could not win. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from moetune.spec.tactic import Tactic

_TILE = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K")
_TILE_TITLE = "M×N×K"
_TITLES = {"GROUP_SIZE_M": "group", "num_warps": "warps", "num_stages": "stages"}
"""Short titles for the parameters of vLLM's and SGLang's grouped GEMM. Other names are shown as they are."""


TORCH_ALGORITHMS = {
    "eager": "a loop over the active experts, with two GEMMs for each",
    "batched_mm": "a product for each slot, with a copy of its expert's weights",
    "grouped_mm": "torch's grouped GEMM over the slots, sorted by expert",
    "segment_mm": "the slots sorted by expert, and two GEMMs for each expert's segment",
    "padded_bmm": "each expert's rows padded to those of the busiest, and one batched GEMM",
    "dense": "every row with every expert of the rank; those not chosen count zero",
}
"""What the tactics of the backend torch compute, by the name of the algorithm."""


def torch_lines(tactics: Iterable[Tactic]) -> list[str]:
    """Returns a line for each algorithm of the backend torch among `tactics`, with what it computes."""
    names = dict.fromkeys(str(tactic.get("algorithm")) for tactic in tactics)
    return [f"{name}: {TORCH_ALGORITHMS[name]}" for name in names if name in TORCH_ALGORITHMS]


def tactic_line(tactic: Tactic) -> str:
    """Returns a tactic as `16×64×128 group=1 warps=4` or `gemm1=12 gemm2=61`, and a single value as `grouped_mm`."""
    parts = _parts(tactic)
    if len(parts) == 1:
        return next(iter(parts.values()))
    return " ".join(value if title == _TILE_TITLE else f"{title}={value}" for title, value in parts.items())


def tactic_columns(tactics: Sequence[Tactic]) -> dict[str, list[str]]:
    """Returns columns as titles and cells: one per parameter if all tactics have the same, else one of lines."""
    parts = [_parts(tactic) for tactic in tactics]
    if len({frozenset(each) for each in parts}) == 1 and len(parts[0]) > 1:
        return {title: [each[title] for each in parts] for title in parts[0]}
    return {"tactic": [tactic_line(tactic) for tactic in tactics]}


def reasons_counted(groups: Sequence[Iterable[str]]) -> dict[str, list[int]]:
    """Returns, for each kind of reason, how many every group has. The most frequent kind is first.

    A kind is the reason with `…` in place of the words that have a digit. `needs 248 bytes, has 64` and
    `needs 512 bytes, has 32` are both `needs … bytes, has …`.
    """
    counters = [Counter(map(_kind, reasons)) for reasons in groups]
    kinds = [kind for kind, _ in sum(counters, Counter()).most_common()]
    return {kind: [counter[kind] for counter in counters] for kind in kinds}


def _kind(reason: str) -> str:
    words = ["…" if any(map(str.isdigit, word)) else word for word in reason.split()]
    return " ".join(word for at, word in enumerate(words) if word != "…" or words[at - 1 : at] != ["…"])


def _parts(tactic: Tactic) -> dict[str, str]:
    values = {name: str(value) for name, value in tactic.items()}
    if not all(name in values for name in _TILE):
        return values
    tile = {_TILE_TITLE: "×".join(values.pop(name) for name in _TILE)}
    return tile | {_TITLES.get(name, name): value for name, value in values.items()}
