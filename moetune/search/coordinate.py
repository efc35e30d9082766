"""Coordinate descent: sweeps one coordinate of a tactic at a time, then combines the best values of each.

For tactics whose parts hardly depend on each other, such as one kernel for each of two GEMMs that run one after the
other. The time is about a sum of one term a coordinate, so 45 + 81 measurements are enough for 45 × 81 tactics.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import product

from moetune.search.base import Batch, Search, Times
from moetune.spec.tactic import Tactic, Value

SCAN = 8
"""The number of tactics that are timed before the first sweep. The best fixes the coordinates that are not swept."""
HOPELESS = 1.5
"""Values slower than this times the sweep's best are not timed again."""
ETA = 3
"""At most this fraction of a sweep's values, one in `ETA`, is timed a second time."""
LEAST = 6
"""The best values of a sweep that are timed a second time in any case, and the most that are timed a third time."""
PROMISING = 1.3
"""Values within this times their line's best are tried in a neighboring bucket.

On recorded times of three ladders (H200, packed rows and `deepep_high_throughput` on 8 and 32 ranks) the best value of
a bucket was within 1.2 in the bucket before. Replayed 20 times each, the best finalist was 0.03 to 0.05 % slower in the
mean and 1.1 % at worst. With 1.4 times the best pair of all as the limit it was up to 4.9 % slower.
"""


def coordinate(
    tactics: Sequence[Tactic],
    *,
    starts: Sequence[Tactic] = (),
    explore: int = 4,
    rounds: tuple[int, int, int] = (1, 4, 16),
    passes: int = 1,
    finalists: int = 6,
    turn: int = 0,
) -> Search:
    """Times a few tactics, sweeps each coordinate from the best so far, and returns combinations of the best values.

    A sweep times every value once, drops the hopeless, times the rest with more rounds, and the few best of those with
    still more. The finalists are the product of each coordinate's two best values, and each third-best value with the
    others at their best, so that something is left if all the best have a cliff.

    Args:
        tactics: the candidates. Sweeps propose nothing else, so the candidates need not form a full grid.
        starts: tactics that were fast in neighboring buckets, the best first; those that are no candidates are ignored.
            With starts the first ones are timed first, and a sweep covers their values and some others only.
        explore: a sweep with starts also tries one in this many of all values; see `explored`.
        rounds: how often a tactic is timed before the sweeps and in a sweep's first pass, in its second and its third.
        passes: how often all coordinates are swept; fewer times if a pass does not change the best.
        finalists: the most tactics that are returned.
        turn: the bucket's number, which chooses the first tactics of a search without starts, and what is explored.
    """
    if not tactics:
        return ()
    grid = _Grid(tactics)
    known = [tactic for tactic in dict.fromkeys(starts) if tactic in grid]
    first = known[:SCAN] or random.Random(turn).sample(list(tactics), min(SCAN, len(tactics)))
    leaders = _ranked((yield Batch(tuple(first), rounds[0])))
    if not leaders:
        return ()
    best = next(filter(grid.on_a_line, leaders), leaders[0])
    # a leader that shares no line with another, such as an engine's fallback, is a finalist but cannot be swept from
    off_the_grid = leaders[:1] if best != leaders[0] else []
    shortlists: dict[str, list[Value]] = {}
    for _ in range(passes):
        before = best
        for name in before:
            line = grid.line(best, name)
            if known:
                values = {
                    best[name],
                    *(tactic.get(name) for tactic in known),
                    *explored(grid.values(name), turn, explore),
                }
                line = [tactic for tactic in line if tactic[name] in values]
            ranked = _ranked((yield from _sweep(line, rounds))) or [best]
            best = ranked[0]
            shortlists[name] = [tactic[name] for tactic in ranked[:3]]
        if best == before:
            break
    combined = (tactic for tactic in _combinations(best, shortlists) if tactic in grid)
    return tuple(dict.fromkeys((*off_the_grid, *combined)))[:finalists]


def explored(values: Sequence[Value], turn: int, every: int) -> Sequence[Value]:
    """Returns one in `every` of a coordinate's values; `every` turns in a row return them all.

    Values drawn at random instead found a value 13 buckets late that the first bucket had no use for (H200,
    FlashInfer's GEMM1 tactic 32, 1.3 % faster than the next).
    """
    return values[turn % every :: every]


def promising(times: Times) -> tuple[Tactic, ...]:
    """Returns the tactics of one bucket that the next one should try: those near a line's best, the fastest first."""
    near = {
        tactic
        for line in _Grid(times).lines
        if len(line) > 1
        for tactic in line
        if times[tactic] <= PROMISING * min(times[other] for other in line)
    }
    return tuple(tactic for tactic in _ranked(times) if tactic in near)


class _Grid:
    """The lines of some tactics. Those on one line differ in one coordinate only."""

    def __init__(self, tactics: Iterable[Tactic]) -> None:
        self._tactics = set(tactics)
        self._lines: dict[tuple[str, frozenset[tuple[str, Value]]], list[Tactic]] = {}
        self._values: dict[str, dict[Value, None]] = {}
        for tactic in tactics:
            for name, value in tactic.items():
                self._lines.setdefault(_key(tactic, name), []).append(tactic)
                self._values.setdefault(name, {})[value] = None

    def __contains__(self, tactic: Tactic) -> bool:
        return tactic in self._tactics

    @property
    def lines(self) -> Iterable[list[Tactic]]:
        """All lines, each in the order of the tactics."""
        return self._lines.values()

    def line(self, at: Tactic, name: str) -> list[Tactic]:
        """Returns the tactics that differ from `at` in the coordinate `name` only, and `at` itself."""
        return self._lines[_key(at, name)]

    def values(self, name: str) -> list[Value]:
        """Returns the values of a coordinate, in the order of the tactics."""
        return list(self._values[name])

    def on_a_line(self, tactic: Tactic) -> bool:
        """Whether the tactic shares a line with another."""
        return any(len(self.line(tactic, name)) > 1 for name in tactic)


def _key(tactic: Tactic, name: str) -> tuple[str, frozenset[tuple[str, Value]]]:
    return name, frozenset(item for item in tactic.items() if item[0] != name)


def _sweep(line: Sequence[Tactic], rounds: tuple[int, int, int]) -> Generator[Batch, Times, Times]:
    """Times a line once, its best tactics again and the best of those once more; returns the times of the last pass."""
    times = yield Batch(tuple(line), rounds[0])
    ranked = _ranked(times)
    near = sum(times[tactic] <= HOPELESS * times[ranked[0]] for tactic in ranked)
    again = tuple(ranked[: max(LEAST, min(near, len(line) // ETA))])
    if len(again) > 1:
        times = (yield Batch(again, rounds[1])) or times
        if len(best := tuple(_ranked(times)[:LEAST])) > 1:
            times = (yield Batch(best, rounds[2])) or times
    return times


def _combinations(best: Tactic, shortlists: Mapping[str, list[Value]]) -> Iterator[Tactic]:
    """Combines each coordinate's two best values, the best ranks first; then each third-best with the others' best."""
    for ranks in sorted(product(*(range(len(values[:2])) for values in shortlists.values())), key=sum):
        yield Tactic({name: values[rank] for rank, (name, values) in zip(ranks, shortlists.items(), strict=True)})
    for name, values in shortlists.items():
        if len(values) > 2:
            yield Tactic({**best, name: values[2]})


def _ranked(times: Times) -> list[Tactic]:
    return sorted(times, key=lambda tactic: times[tactic])
