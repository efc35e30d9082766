"""Chooses among equally fast tactics, so that an exported file has few distinct ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Final, TypeVar

T = TypeVar("T", bound=Hashable)
EXACT: Final = 12
"""The most different options for which the least number is found by trying all combinations; else a greedy choice."""


def fewest(options: Sequence[Sequence[T]]) -> list[T]:
    """Returns one option for each position, with as few distinct ones in all as it finds.

    With up to `EXACT` options to decide among, no choice has fewer. With more, the option that serves the most
    positions is taken first (the greedy set cover). A position keeps its first option if that is chosen anyway. If the
    first options have no more distinct ones than what was found, they are returned.

    Args:
        options: for each position its options, the preferred one first; at least one.
    """
    first = [each[0] for each in options]
    fixed = {each[0] for each in options if len(set(each)) == 1}
    undecided = [each for each in options if fixed.isdisjoint(each)]
    chosen = fixed | _cover(undecided)
    if len(chosen) >= len(set(first)):
        return first
    return [next(option for option in each if option in chosen) for each in options]


def _cover(options: Sequence[Sequence[T]]) -> set[T]:
    """Returns options such that each position has one of them; of the smallest sets, one with many first options."""
    preferred = Counter(each[0] for each in options)
    found: list[T] = []
    left = list(options)
    while left:
        serving = Counter(option for each in left for option in dict.fromkeys(each))
        found.append(max(serving, key=lambda option: (serving[option], preferred[option])))
        left = [each for each in left if found[-1] not in each]
    pool = list(dict.fromkeys(option for each in options for option in each))
    if len(pool) > EXACT:
        return set(found)
    for size in range(len(found) + 1):
        covers = [
            subset for subset in combinations(pool, size) if all(not set(subset).isdisjoint(each) for each in options)
        ]
        if covers:
            return set(max(covers, key=lambda cover: sum(preferred[option] for option in cover)))
    return set(found)
