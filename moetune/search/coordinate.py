"""Coordinate descent: sweeps one coordinate of a tactic at a time, then lets the best values of each meet.

For tactics whose parts hardly depend on each other, such as one kernel for each of two GEMMs run one after the other:
the time is about a sum of one term a coordinate, so 45 × 81 tactics are known by 45 + 81 measurements.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import product

from moetune.search.base import Batch, Search, Times
from moetune.spec.tactic import Tactic, Value

SCAN = 8
"""Tactics tried before the first sweep, so that the coordinates that stand still stand well."""
HOPELESS = 1.5
"""A value slower than this times the sweep's best is not timed again …"""
ETA = 3
"""… nor is one behind the first third …"""
LEAST = 6
"""… unless it is among the first this many. So many of the best of a second pass are timed in a third."""
PROMISING = 1.3
"""A value within this times its line's best is worth a try in a neighboring bucket.

On recorded times of three ladders (H200, packed rows and `deepep_high_throughput` on 8 and 32 ranks) the best value of
a bucket was within 1.2 in the bucket before. Replayed 20 times each, the best finalist is 0.03 to 0.05 % behind in the
mean and 1.1 % at worst; where 1.4 times the best pair of all was the limit, it was up to 4.9 %.
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
    """A scan, a sweep of each coordinate from the best so far, and finalists in which the best values of all meet.

    A sweep times every value once, drops the hopeless, times the rest with more rounds, and the few best of those with
    still more. The finalists are the product of each coordinate's two best values, and every third-best one beside the
    others' best: should all the best fall off a cliff, something is left.

    Args:
        tactics: the candidates; sweeps keep to them, so they need not form a full grid.
        starts: tactics that were good in neighboring buckets, the best first; unknown ones are ignored. With
            them the scan tries the first few, and the sweeps are over their values and some others only.
        explore: one in so many values of a coordinate is tried though no start has it, another one each turn.
        rounds: how often a tactic is timed in the scan and in the first, second and third pass of a sweep.
        passes: how often all coordinates are swept; it ends earlier when one changes nothing.
        finalists: how many at most are returned.
        turn: the bucket's number, which chooses the scan without starts and what is explored: `explore` buckets in a
            row try all values. By chance instead, a value that the first bucket had no use for was found 13 buckets
            later (H200, FlashInfer's GEMM1 tactic 32, 1.3 % faster than the next).
    """
    legal = set(tactics)
    known = [tactic for tactic in dict.fromkeys(starts) if tactic in legal]
    scan = known[:SCAN] or random.Random(turn).sample(list(tactics), min(SCAN, len(tactics)))
    leaders = _ranked((yield Batch(tuple(scan), rounds[0]))) if scan else []
    if not leaders:
        return ()
    # one that shares no line with another, as an engine's own fallback may, leads nowhere
    best = next((tactic for tactic in leaders if _on_a_line(tactics, tactic)), leaders[0])
    alone = leaders[:1] if leaders[0] != best else []
    shortlists: dict[str, list[Value]] = {}
    for _ in range(passes):
        before = best
        for name in before:
            line = _line(tactics, best, name)
            if known:
                values = list(dict.fromkeys(tactic[name] for tactic in tactics if name in tactic))
                tried = {best[name], *(tactic.get(name) for tactic in known), *values[turn % explore :: explore]}
                line = [tactic for tactic in line if tactic[name] in tried]
            ranked = _ranked((yield from _sweep(line, rounds))) or [best]
            best = ranked[0]
            shortlists[name] = [tactic[name] for tactic in ranked[:3]]
        if best == before:
            break
    return tuple(dict.fromkeys((*alone, *_meetings(best, shortlists, legal))))[:finalists]


def promising(times: Times) -> tuple[Tactic, ...]:
    """Of all that one bucket measured, what to give the next one as `starts`: near a line's best, the fastest first."""
    lines: dict[tuple[str, frozenset[tuple[str, Value]]], list[Tactic]] = {}
    for tactic in times:
        for name, value in tactic.items():
            lines.setdefault((name, frozenset(tactic.items() - {(name, value)})), []).append(tactic)
    near = {
        tactic
        for line in lines.values()
        if len(line) > 1
        for tactic in line
        if times[tactic] <= PROMISING * min(times[other] for other in line)
    }
    return tuple(tactic for tactic in _ranked(times) if tactic in near)


def _sweep(line: Sequence[Tactic], rounds: tuple[int, int, int]) -> Generator[Batch, Times, Times]:
    """Times a line once, its best again and the best of those once more; returns the times of the last pass."""
    times = yield Batch(tuple(line), rounds[0])
    ranked = _ranked(times)
    near = sum(times[tactic] <= HOPELESS * times[ranked[0]] for tactic in ranked)
    again = tuple(ranked[: max(LEAST, min(near, len(line) // ETA))])
    if len(again) > 1:
        times = (yield Batch(again, rounds[1])) or times
        if len(best := tuple(_ranked(times)[:LEAST])) > 1:
            times = (yield Batch(best, rounds[2])) or times
    return times


def _line(tactics: Sequence[Tactic], at: Tactic, name: str) -> list[Tactic]:
    """The tactics that differ from `at` in one coordinate only, and `at` itself."""
    others = [(other, value) for other, value in at.items() if other != name]
    return [
        tactic
        for tactic in tactics
        if len(tactic) == len(at) and name in tactic and all(tactic.get(other) == value for other, value in others)
    ]


def _on_a_line(tactics: Sequence[Tactic], tactic: Tactic) -> bool:
    return any(len(_line(tactics, tactic, name)) > 1 for name in tactic)


def _meetings(best: Tactic, shortlists: Mapping[str, list[Value]], legal: set[Tactic]) -> Iterator[Tactic]:
    """The product of the two first values of each coordinate, the least far down first; then each third value."""
    places = sorted(product(*(range(len(values[:2])) for values in shortlists.values())), key=sum)
    for place in places:
        met = {name: values[at] for at, (name, values) in zip(place, shortlists.items(), strict=True)}
        if (tactic := Tactic(met)) in legal:
            yield tactic
    for name, values in shortlists.items():
        if len(values) > 2 and (tactic := Tactic({**best, name: values[2]})) in legal:
            yield tactic


def _ranked(times: Times) -> list[Tactic]:
    return sorted(times, key=lambda tactic: times[tactic])
