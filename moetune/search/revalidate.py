"""Checks the winners of an older profile against their neighbors and the default, instead of searching again.

Between two versions of a compiler the best tactic moves little. On the recorded tables of the Triton backend (H200,
Qwen3-235B and DeepSeek-R1, 48 cells) the winner of one load was on average 4 to 6 % slower than the best on another
load, and the best of these at most 16 tactics 0.5 to 0.7 % slower. More rounds, more finalists or more samples in the
final comparison change that by less than 0.1 %, so few are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from moetune.search.base import Batch, Search
from moetune.spec.tactic import Tactic, Value

FIRST = 12
"""The most tactics that are timed in any case. They are known before the bucket's turn, so they are compiled ahead."""
MOST = 16
"""The most tactics of one bucket."""
OTHERS = 2
"""The number of other buckets whose winners are among the first tactics."""
MOVED = 1.02
"""If the fastest tactic beats the old winner by more than this factor, its own neighbors are timed too."""


def first_tactics(
    default: Tactic,
    winners: Sequence[Tactic],
    others: Sequence[Tactic],
    neighbors: Sequence[Tactic],
    candidates: Sequence[Tactic],
) -> tuple[Tactic, ...]:
    """Returns the at most `FIRST` tactics to time first; all candidates if there are no more.

    Args:
        default: the default tactic.
        winners: the old winner and the tactics that were equally fast. Those that are no candidates are ignored.
        others: the old winners of the other buckets, the nearest first.
        neighbors: the neighbors of the old winner.
        candidates: the tactics that may be timed.
    """
    if len(candidates) <= FIRST:
        return tuple(candidates)
    offered = set(candidates)
    wanted = (default, *winners, *others[:OTHERS], *neighbors, *others[OTHERS:])
    return tuple(dict.fromkeys(tactic for tactic in wanted if tactic in offered))[:FIRST]


def revalidate(
    first: Sequence[Tactic],
    winner: Tactic,
    neighbors: Callable[[Tactic], Sequence[Tactic]],
    *,
    rounds: int = 2,
    finalists: int = 3,
) -> Search:
    """Times the first tactics, and the neighbors of the fastest if it clearly beats the old winner.

    Args:
        first: the tactics to time in any case, from `first_tactics`, and perhaps some more.
        winner: the old winner.
        neighbors: returns the neighbors of a tactic, the likeliest first.
        rounds: how often each tactic is timed.
        finalists: the most tactics that are returned.
    """
    if not first:
        return ()
    times = dict((yield Batch(tuple(first), rounds)))
    if times:
        leader = min(times, key=lambda tactic: times[tactic])
        has_moved = times.get(winner, math.inf) > MOVED * times[leader]
        further = [tactic for tactic in neighbors(leader) if tactic not in first] if has_moved else []
        if further := further[: MOST - len(first)]:
            again = yield Batch((leader, *further), rounds)  # with the leader, because clock rates drift
            drift = again.get(leader, times[leader]) / times[leader]
            times |= {tactic: time_us / drift for tactic, time_us in again.items()}
    return tuple(sorted(times, key=lambda tactic: times[tactic])[:finalists])


def steps(tactics: Sequence[Tactic], at: Tactic) -> tuple[Tactic, ...]:
    """Returns the tactics one step from `at`: the next smaller and the next larger value of each tunable."""
    lines: dict[str, list[Tactic]] = {name: [] for name in at}
    for tactic in tactics:
        differing = [name for name, value in at.items() if tactic.get(name) != value]
        if len(differing) == 1:
            lines[differing[0]].append(tactic)
    found: list[Tactic] = []
    for name, line in lines.items():
        here, ordered = _rank(at[name]), sorted(line, key=lambda tactic: _rank(tactic[name]))
        found += [tactic for tactic in ordered if _rank(tactic[name]) < here][-1:]
        found += [tactic for tactic in ordered if _rank(tactic[name]) > here][:1]
    return tuple(found)


def exchanged(tactics: Sequence[Tactic], at: Tactic, others: Sequence[Tactic]) -> tuple[Tactic, ...]:
    """Returns the tactics that take one value from one of `others` and the rest from `at`, the first others first.

    For tunables whose values are mere numbers, so that the next number need not be similar.
    """
    offered = set(tactics)
    made = (Tactic({**at, name: other[name]}) for other in others for name in at if name in other)
    return tuple(dict.fromkeys(tactic for tactic in made if tactic in offered and tactic != at))


def _rank(value: Value) -> tuple[str, Value]:
    return type(value).__name__, value
