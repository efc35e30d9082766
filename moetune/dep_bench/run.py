"""Defines `dep_bench`, which measures all batch sizes and routings of one deployment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from moetune.backends.base import Backend
from moetune.dep_bench.arms import Arm, Tune, arms_of
from moetune.dep_bench.collectives import align
from moetune.dep_bench.device_clock import clock_for
from moetune.dep_bench.journal import PointJournal
from moetune.dep_bench.measure import Calls, measure
from moetune.dep_bench.one_rank import OneRank
from moetune.dep_bench.over_ranks import OverRanks
from moetune.dep_bench.process_group import Ranks
from moetune.dep_bench.result import DepBench, Point
from moetune.dep_bench.router import router_of
from moetune.dep_bench.setting import BATCHES, ROUNDS, Setting, setting_of
from moetune.errors import UsageError
from moetune.measure.probe import environment
from moetune.spec.layer import MoELayer
from moetune.spec.model import digest_of
from moetune.spec.regime import Regime
from moetune.workload.wire import WireActivation, WireRouting, wire

TOKENS = tuple(8 << exponent for exponent in range(9))
"""The default batch sizes: 8 … 2048."""
ROUTINGS = ("random", "zipf:0.5")
"""The default routings: uniform and skewed."""
_KEYED_ROWS = tuple(1 << exponent for exponent in range(17))
"""The row counts at which the tactics of arms are part of a journal's key."""

OnPoint = Callable[[Point], None]


def dep_bench(
    layer: MoELayer,
    regime: Regime,
    backend: Backend,
    spare: Backend,
    ranks: Ranks,
    tune: Tune,
    *,
    tokens: Sequence[int] = TOKENS,
    routings: Sequence[str] = ROUTINGS,
    activation: WireActivation = "bf16",
    wire_routing: WireRouting | None = None,
    seconds: float | None = None,
    journal: Path | None = None,
    batches: int = BATCHES,
    rounds: int = ROUNDS,
    on_point: OnPoint = lambda point: None,
) -> DepBench:
    """Measures the block with the tactics of each tuner. It is a collective.

    With one process it measures one rank of `regime.ep_size`, without the wire.

    Args:
        layer, regime: the deployment. Moetune's profile for this dispatcher is tuned under `regime`.
        backend: the backend.
        spare: another instance of it.
        ranks: the processes.
        tune: returns moetune's profile of a regime. It is called on the first rank alone.
        tokens: the batch sizes of a rank.
        routings: the distributions of the router's choices.
        activation, wire_routing: the formats on the wire, as `workload.wire.wire` names them.
        seconds: no point is started after this many seconds.
        journal: a file of finished points, which are not measured again.
        batches, rounds: how often a point is timed.
        on_point: is called on the first rank with each finished point.

    Raises:
        UsageError: no batch sizes, or one below 1; or as `Router`.
        UnsupportedError: this deployment, layer, backend or format cannot be measured here.
        NoResultError: an output is wrong, or the first rank failed.
    """
    begin = time.monotonic()
    if not tokens or min(tokens) < 1:
        raise UsageError("The batch sizes must be at least 1, and there must be one.", "Give --tokens 8,64,512.")
    setting = setting_of(layer, regime, backend, spare, ranks, activation, wire_routing, batches, rounds)
    for routing in routings:
        router_of(layer, routed(regime, routing).distribution, regime.seed, ranks.device)
    arms, missing = arms_of(backend, layer, regime, ranks, tune)
    sources = {arm.name: arm.source for arm in arms}
    finished = PointJournal(journal if ranks.leads else None)
    key = partial(_key, setting, arms)
    points: list[Point] = []
    left_out: list[tuple[int, str]] = []
    for routing in routings:
        for count in tokens:
            name = key(count, routing)
            late = seconds is not None and time.monotonic() - begin > seconds
            found, stop = ranks.broadcast((finished.find(name), late))
            if found is None and stop:
                left_out.append((count, routing))
                continue
            point = found or _measured(setting, arms, count, routing)
            if found is None and ranks.leads:
                finished.add(name, point)
            if ranks.leads:
                on_point(point)
            points.append(point)
    return DepBench(
        layer=layer,
        regime=regime,
        backend=backend.name,
        environment=environment(backend, ranks.device),
        ranks=ranks.size,
        wire=setting.form.activation,
        wire_routing=setting.form.routing,
        sources=sources,
        missing=missing,
        points=tuple(points),
        left_out=tuple(left_out),
    )


def _measured(setting: Setting, arms: Sequence[Arm], tokens: int, routing: str) -> Point:
    regime = routed(setting.regime, routing)
    calls: Calls
    plan_bytes = 0
    if setting.ranks.size > 1:
        calls = OverRanks(setting, regime, tokens)
        formats = setting.form.activation, setting.form.routing
        plan_bytes = wire(setting.layer, regime, tokens, *formats, setting.ranks.rank).dispatch_bytes
    else:
        calls = OneRank(setting, regime, tokens)
    of_ranks = setting.ranks.gather(plan_bytes)
    point = measure(
        calls,
        arms,
        clock_for(setting.ranks, partial(align, setting.ranks)),
        setting.ranks,
        tokens=tokens,
        routing=routing,
        plan_bytes=round(sum(of_ranks) / len(of_ranks)),
        batches=setting.batches,
        rounds=setting.rounds,
    )
    if setting.ranks.device != "cpu":
        torch.cuda.empty_cache()  # the memory of this point's graphs is of no use to the next
    return point


def routed(regime: Regime, distribution: str) -> Regime:
    """Returns `regime` with another distribution.

    Raises:
        UsageError: as `Regime`.
    """
    fields = {name: getattr(regime, name) for name in Regime.model_fields}
    return Regime(**{**fields, "distribution": distribution})


def _key(setting: Setting, arms: Sequence[Arm], tokens: int, routing: str) -> str:
    """Returns a digest of all that a point depends on."""
    found = environment(setting.backend, setting.ranks.device)
    return digest_of(
        {
            "layer": setting.layer.digest,
            "regime": setting.regime.digest,
            "backend": setting.backend.name,
            "environment": [found.device, found.strict],
            "ranks": setting.ranks.size,
            "wire": [setting.form.activation, setting.form.routing],
            "timed": [setting.batches, setting.rounds],
            "arms": {arm.name: [dict(arm.tactic_of(rows)) for rows in _KEYED_ROWS] for arm in arms},
            "tokens": tokens,
            "routing": routing,
        }
    )
