"""Measures few of many tactics: a prior proposes, measurements correct it, the best are measured again and again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import sub

from moetune.search.base import Batch, Search
from moetune.spec.tactic import Tactic, Value

ETA = 4
"""Of the tactics of one rung a quarter goes on to the next."""
_NEARNESS = 0.5
_SHARPNESS = 6
"""A measured tactic d steps away corrects the prior with weight (0.5 + d)⁻⁶: the nearest decide."""


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
    """Successive halving over candidates that a corrected prior proposes.

    The first rung holds `starts` and the best by the prior, half of what may be measured. Then, in a few batches, the
    tactics that look best once the prior is corrected by the measurements nearby: predicted · exp(weighted mean of
    log(measured / predicted)). A quarter of all is measured again with more rounds.

    Args:
        tactics: the candidates; the first is the engine's default, which is always measured.
        predicted_us: the prior, of every candidate; without it the first rung is spread evenly over the candidates.
        starts: tactics that were good in neighboring buckets, the best first; unknown ones are ignored.
        share: of the candidates that may be measured.
        rounds: how often each is timed at first.
        more_rounds: how often a tactic of the second rung is timed.
        finalists: how many at most are returned.
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
    """The candidates as points of a grid, with what is known and expected of each."""

    def __init__(self, tactics: Sequence[Tactic], predicted_us: Mapping[Tactic, float]) -> None:
        self._tactics = tuple(tactics)
        self._number = {tactic: number for number, tactic in enumerate(self._tactics)}
        self._points = _grid(self._tactics)
        self._prior = [math.log(predicted_us[tactic]) for tactic in self._tactics]
        self._residuals = [0.0] * len(self._tactics)
        self._weights = [0.0] * len(self._tactics)
        self._open = set(range(len(self._tactics)))
        farthest = sum(map(max, zip(*self._points, strict=True)))
        self._weight_of = [(_NEARNESS + distance) ** -_SHARPNESS for distance in range(farthest + 1)]

    def __contains__(self, tactic: Tactic) -> bool:
        return tactic in self._number

    def close(self, batch: Sequence[Tactic]) -> None:
        """These are not proposed again."""
        self._open.difference_update(self._number[tactic] for tactic in batch)

    def learn(self, times: Mapping[Tactic, float]) -> None:
        """What was measured corrects the expectations around it."""
        for tactic, time_us in times.items():
            at = self._number[tactic]
            residual, here = math.log(time_us) - self._prior[at], self._points[at]
            for number in self._open:
                weight = self._weight_of[sum(map(abs, map(sub, here, self._points[number])))]
                self._residuals[number] += weight * residual
                self._weights[number] += weight

    def promising(self, count: int) -> tuple[Tactic, ...]:
        """The `count` open tactics that are expected to be fastest; ties in the order given."""
        ranked = sorted(self._open, key=lambda number: (self._expected(number), number))
        return tuple(self._tactics[number] for number in ranked[: max(count, 0)])

    def distinct(self, count: int) -> tuple[Tactic, ...]:
        """As `promising` before anything is known, but one tactic only of those that the prior cannot tell apart."""
        first_of = {prior: number for number, prior in reversed(list(enumerate(self._prior)))}
        return tuple(self._tactics[first_of[prior]] for prior in sorted(first_of)[:count])

    def _expected(self, number: int) -> float:
        weight = self._weights[number]
        return self._prior[number] + (self._residuals[number] / weight if weight else 0.0)


def _grid(tactics: Sequence[Tactic]) -> list[tuple[int, ...]]:
    """Each tactic as the ranks of its values among those that its names take."""
    names = list(tactics[0])
    ranks: list[dict[Value, int]] = []
    for name in names:
        values = {tactic[name] for tactic in tactics}
        ranks.append({value: rank for rank, value in enumerate(sorted(values, key=lambda v: (str(type(v)), v)))})
    return [tuple(rank[tactic[name]] for name, rank in zip(names, ranks, strict=True)) for tactic in tactics]
