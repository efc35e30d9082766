"""Times all arms of one point, interleaved, and returns the `Point`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from moetune.dep_bench.arms import Arm
from moetune.dep_bench.block import TacticOf
from moetune.dep_bench.part_clock import MarkedCall, PartClock, Parts
from moetune.dep_bench.process_group import Ranks
from moetune.dep_bench.result import ArmTime, PartTime, Point
from moetune.measure.clock import no_garbage_collection, order
from moetune.spec.tactic import Tactic
from moetune.stats import geomean, noise_floor, paired_ratio

if TYPE_CHECKING:
    import torch

Samples = Sequence[Sequence[Parts]]
"""[rank][sample]. Sample i of every series was taken in the same turn, on the same batch."""


class Calls(Protocol):
    """The calls of one point; see `OverRanks`."""

    rows: list[int]
    received_bytes: list[int]

    @property
    def is_static(self) -> bool:
        """Whether a CUDA graph can capture the calls."""
        ...

    def warm(self, tactic_of: TacticOf) -> torch.Tensor:
        """Runs an arm untimed, and returns its output on the first batch."""
        ...

    def check(self, out: torch.Tensor) -> float:
        """Returns the relative error of what `warm` returned. Raises NoResultError if it is too large."""
        ...

    def call(self, tactic_of: TacticOf, batch: int) -> MarkedCall:
        """Returns a call of the block on one batch."""
        ...

    def dummy(self, tactic_of: TacticOf, batch: int) -> MarkedCall | None:
        """Returns a call of the kernel on a sampled routing, or None if the block's are sampled."""
        ...


@dataclass(frozen=True, slots=True)
class Timed:
    """One arm's samples in the block, and on sampled routings if there are any."""

    block: Samples
    dummy: Samples | None

    @property
    def slowest_us(self) -> list[float]:
        """The time of the block on the slowest rank, by sample."""
        return [max(sum(parts.values()) for parts in of_ranks) for of_ranks in zip(*self.block, strict=True)]

    @property
    def fidelity(self) -> list[float]:
        """The kernel's mean time in the block over its mean time on sampled routings, by rank; empty without these."""
        if self.dummy is None:
            return []
        return [_experts_us(block) / _experts_us(dummy) for block, dummy in zip(self.block, self.dummy, strict=True)]


def measure(
    calls: Calls,
    arms: Sequence[Arm],
    clock: PartClock,
    ranks: Ranks,
    *,
    tokens: int,
    routing: str,
    plan_bytes: int,
    batches: int,
    rounds: int,
) -> Point:
    """Returns one point. It is a collective.

    Arms that run the same tactics on every rank and batch are timed once. The last arm is timed twice, for the noise.

    Args:
        calls: the calls.
        arms: the arms; the last is the one that the others are compared with.
        clock: times them.
        ranks: the ranks.
        tokens, routing, plan_bytes: as in `Point`.
        batches, rounds: how often each arm is timed.

    Raises:
        NoResultError: an arm's output is wrong on this rank.
        RankError: it is wrong on another rank.
    """
    errors = []
    for arm in arms:
        out = calls.warm(arm.tactic_of)
        errors.append(max(ranks.gather(ranks.together(partial(calls.check, out)))))
    chosen = [tuple(arm.tactic_of(rows) for rows in calls.rows if rows) for arm in arms]
    keys = list(zip(*ranks.gather(chosen), strict=True))
    first_of = {key: position for position, key in reversed(list(enumerate(keys)))}
    distinct = [arms[position] for position in sorted(first_of.values())]
    taken = _samples(calls, [*distinct, arms[-1]], clock, ranks, batches, rounds)
    by_arm = [taken[distinct.index(arms[first_of[key]])] for key in keys]
    last, again = by_arm[-1], taken[-1]
    noise = noise_floor(last.slowest_us, again.slowest_us)
    rows = [one for of_rank in ranks.gather(calls.rows) for one in of_rank]
    received = [one for of_rank in ranks.gather(calls.received_bytes) for one in of_rank]
    times = [
        _arm_time(arm, tactics, timed, last, tokens, error)
        for arm, tactics, timed, error in zip(arms, chosen, by_arm, errors, strict=True)
    ]
    return Point(
        tokens=tokens,
        routing=routing,
        rows_low=min(rows),
        rows_high=max(rows),
        arms=tuple(times),
        parts=_parts(last.block),
        noise=noise,
        plan_bytes=plan_bytes,
        received_bytes=round(statistics.fmean(received)),
        fidelity=geomean(last.fidelity) if last.fidelity else None,
        fidelity_by_rank=tuple(last.fidelity),
        dummy_agrees=_agrees(times, noise),
        eager=clock.eager,
    )


def _samples(
    calls: Calls, arms: Sequence[Arm], clock: PartClock, ranks: Ranks, batches: int, rounds: int
) -> list[Timed]:
    """Returns the samples of each arm, of all ranks. The arms alternate on each batch."""
    series = [[calls.call(arm.tactic_of, batch) for batch in range(batches)] for arm in arms]
    dummies = [[calls.dummy(arm.tactic_of, batch) for batch in range(batches)] for arm in arms[:-1]]
    sampled = [[call for call in of_arm if call is not None] for of_arm in dummies if None not in of_arm]
    of_series = [*series, *sampled]
    mine: list[list[Parts]] = [[] for _ in of_series]
    with no_garbage_collection():
        made = iter(clock.takes([call for calls_of in of_series for call in calls_of], static=calls.is_static))
        takes = [list(islice(made, batches)) for _ in of_series]
        for turn in range(-1, rounds):  # the first round is not counted: after a pause a GPU is faster for a while
            for batch in range(batches):
                for position in order(len(takes), max(turn, 0) * batches + batch):
                    takes[position][batch].start()
            if turn < 0:
                continue
            for found, taken in zip(mine, takes, strict=True):
                found.extend(take.read() for take in taken)
    of_ranks = ranks.gather(mine)
    by_series: list[Samples] = [[of_rank[position] for of_rank in of_ranks] for position in range(len(mine))]
    block, dummy = by_series[: len(arms)], by_series[len(arms) :]
    return [Timed(each, dummy[number] if number < len(dummy) else None) for number, each in enumerate(block)]


def _arm_time(arm: Arm, tactics: Sequence[Tactic], timed: Timed, last: Timed, tokens: int, error: float) -> ArmTime:
    mean_us = statistics.fmean(timed.slowest_us)
    ratio = paired_ratio(timed.slowest_us, last.slowest_us)
    dummy_us = None if timed.dummy is None else statistics.fmean(map(_experts_us, timed.dummy))
    return ArmTime(
        arm=arm.name,
        tactics=tuple(dict.fromkeys(tactics)),
        time_us=mean_us,
        tokens_per_s=1e6 * tokens / mean_us,
        gain=ratio.value,
        gain_low=ratio.low,
        gain_high=ratio.high,
        dummy_us=dummy_us,
        experts_us=statistics.fmean(map(_experts_us, timed.block)),
        error=error,
    )


def _experts_us(samples: Sequence[Parts]) -> float:
    return statistics.fmean(parts["experts"] for parts in samples)


def _parts(block: Samples) -> tuple[PartTime, ...]:
    by_sample = list(zip(*block, strict=True))
    found = []
    for name in dict.fromkeys(name for of_rank in block for parts in of_rank for name in parts):
        of_part = [[parts.get(name, 0.0) for parts in of_ranks] for of_ranks in by_sample]
        fastest, slowest = (statistics.fmean(map(pick, of_part)) for pick in (min, max))
        found.append(PartTime(part=name, fastest_us=fastest, slowest_us=slowest))
    return tuple(found)


def _agrees(arms: Sequence[ArmTime], noise: float) -> bool | None:
    """Returns whether the arm that is fastest on sampled routings is the fastest in the block, within the noise."""
    dummies: Mapping[int, float] = {at: arm.dummy_us for at, arm in enumerate(arms) if arm.dummy_us is not None}
    if len(dummies) < len(arms):
        return None
    best = min(dummies, key=lambda at: dummies[at])
    return arms[best].experts_us <= min(arm.experts_us for arm in arms) * (1.0 + noise)
