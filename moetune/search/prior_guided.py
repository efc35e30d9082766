"""Times few of many tactics: a prior proposes them, the measured times correct it, and the best are timed again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moetune.search.base import Batch, Search
from moetune.spec.tactic import Tactic

ETA = 4
"""One in this many of the tactics of the first rung is timed again in the second."""
_NEARNESS = 0.5
_SHARPNESS = 6
"""A measured tactic d steps away corrects the prior with weight (0.5 + d)⁻⁶, so the nearest ones decide."""


def halving(
    tactics: Sequence[Tactic],
    *,
    predicted_us: Mapping[Tactic, float] | None = None,
    starts: Sequence[Tactic] = (),
    share: float = 0.05,
    rounds: int = 4,
    more_rounds: int = 16,
    finalists: int = 6,
) -> Search:
    """Times candidates in two rungs: those that a prior proposes, then the fastest quarter of them with more rounds.

    Half of the first rung is one batch: the default, `starts` and the best candidates by the prior. The other half
    follows in a few batches of the best candidates by the corrected prior, which is predicted · exp(weighted mean of
    log(measured / predicted) over the measured tactics).

    Args:
        tactics: the candidates; the first is the engine's default, which is always measured.
        predicted_us: the prior, a time for every candidate. Without it the first batch is spread evenly over the
            candidates.
        starts: tactics that were fast in neighboring buckets, the best first; those that are no candidates are ignored.
        share: the share of the candidates that may be measured.
        rounds: how often a tactic of the first rung is timed.
        more_rounds: how often a tactic of the second rung is timed.
        finalists: the most tactics that are returned.
    """
    if not tactics:
        return ()
    space = _Space(tactics, predicted_us or dict.fromkeys(tactics, 1.0))
    budget = min(len(tactics), max(2 * ETA, int(share * len(tactics))))
    first = max(1, budget // 2)
    known = tuple(dict.fromkeys(tactic for tactic in (tactics[0], *starts) if tactic in space))[: max(1, first // 2)]
    proposed = space.distinct(first) if predicted_us else tuple(tactics[:: -(-len(tactics) // first)])
    batch = tuple(dict.fromkeys((*known, *proposed)))[:first]
    times: dict[Tactic, float] = {}
    room = budget
    while batch:
        space.close(batch)
        room -= len(batch)
        answer = yield Batch(batch, rounds, likely_next=space.promising(room))
        times |= answer
        space.learn(answer)
        batch = space.promising(min(room, max(ETA, room // 3)))
    ranked = sorted(times, key=lambda tactic: times[tactic])
    again = tuple(ranked[: max(ETA, len(ranked) // ETA)])
    if again:
        times = {**(yield Batch(again, more_rounds))}
    return tuple(sorted(times, key=lambda tactic: times[tactic])[:finalists])


class _Space:
    """Holds the candidates as points of a grid, with the measured and the expected time of each.

    Two points differ in as many bits as their tactics are steps apart.
    """

    def __init__(self, tactics: Sequence[Tactic], predicted_us: Mapping[Tactic, float]) -> None:
        self._tactics = tuple(tactics)
        self._number = {tactic: number for number, tactic in enumerate(self._tactics)}
        self._points = _grid(self._tactics)
        self._prior = [math.log(predicted_us[tactic]) for tactic in self._tactics]
        self._residuals = [0.0] * len(self._tactics)
        self._weights = [0.0] * len(self._tactics)
        self._open = set(range(len(self._tactics)))
        farthest = max(point.bit_length() for point in self._points)
        self._weight_of = [(_NEARNESS + distance) ** -_SHARPNESS for distance in range(farthest + 1)]

    def __contains__(self, tactic: Tactic) -> bool:
        return tactic in self._number

    def close(self, batch: Sequence[Tactic]) -> None:
        """Marks the tactics of a batch, so that they are not proposed again."""
        self._open.difference_update(self._number[tactic] for tactic in batch)

    def learn(self, times: Mapping[Tactic, float]) -> None:
        """Corrects the expected times of the open tactics by the measured times."""
        for tactic, time_us in times.items():
            at = self._number[tactic]
            residual, here = math.log(time_us) - self._prior[at], self._points[at]
            for number in self._open:
                weight = self._weight_of[(here ^ self._points[number]).bit_count()]
                self._residuals[number] += weight * residual
                self._weights[number] += weight

    def promising(self, count: int) -> tuple[Tactic, ...]:
        """Returns the `count` open tactics that are expected to be fastest; ties keep the order of the candidates."""
        ranked = sorted(self._open, key=lambda number: (self._expected(number), number))
        return tuple(self._tactics[number] for number in ranked[: max(count, 0)])

    def distinct(self, count: int) -> tuple[Tactic, ...]:
        """Returns the `count` best tactics by the prior alone, and only the first of those with equal priors."""
        first_of = {prior: number for number, prior in reversed(list(enumerate(self._prior)))}
        return tuple(self._tactics[first_of[prior]] for prior in sorted(first_of)[:count])

    def _expected(self, number: int) -> float:
        weight = self._weights[number]
        return self._prior[number] + (self._residuals[number] / weight if weight else 0.0)


def _grid(tactics: Sequence[Tactic]) -> list[int]:
    """Returns for each tactic the rank of each of its values among all values of that name, in unary, as one number."""
    points = [0] * len(tactics)
    for name in tactics[0]:
        values = {tactic[name] for tactic in tactics}
        ranks = {value: rank for rank, value in enumerate(sorted(values, key=lambda v: (str(type(v)), v)))}
        points = [
            point << len(values) | (1 << ranks[tactic[name]]) - 1 for point, tactic in zip(points, tactics, strict=True)
        ]
    return points
