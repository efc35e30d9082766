"""`Portion`: the buckets of a question that one fleet worker tunes in one go, and how a question is split into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moetune.spec.regime import Regime

PORTIONS_PER_WORKER = 4
"""About how many portions each worker gets, if questions are long enough. So one that is slow holds up few buckets."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Some buckets of question `number`.

    `adds`: whether the buckets that the ladder `adaptive` adds between them are tuned too. `tried_by`: the workers that
    have failed to tune it, or were lost with it; `tries` counts them.
    """

    number: int
    rows: tuple[int, ...]
    adds: bool = False
    tries: int = 0
    tried_by: frozenset[int] = frozenset()


def portion_size(buckets: int, workers: int) -> int:
    """Returns how many buckets a portion has at most.

    Args:
        buckets: the number of missing buckets of all questions that `workers` workers can answer.
        workers: their number. One alone gets whole questions.
    """
    portions = PORTIONS_PER_WORKER * workers if workers > 1 else 1
    return max(1, math.ceil(buckets / portions))


def first_portions(number: int, regime: Regime, missing: Sequence[int], size: int) -> list[Portion]:
    """Returns the portions of a question that can be tuned at once.

    Each has neighboring buckets, because a search begins with its neighbors' fast tactics. If the ladder `adaptive` is
    split, its buckets without a search of their own are left for a last portion: they need the choices of both
    neighbors. So are the buckets that it adds.

    Args:
        number: the question's number.
        regime: its regime.
        missing: its missing buckets, ascending.
        size: how many buckets a portion has at most.
    """
    adaptive = regime.ladder.name == "adaptive"
    if len(missing) <= size:
        return [Portion(number, tuple(missing), adds=adaptive)]
    searched = [rows for rows in missing if regime.ladder.is_searched(rows)]
    if not searched:
        return [Portion(number, tuple(missing), adds=adaptive)]
    count = math.ceil(len(searched) / size)
    bounds = [index * len(searched) // count for index in range(count + 1)]
    return [Portion(number, tuple(searched[begin:end])) for begin, end in pairwise(bounds)]
