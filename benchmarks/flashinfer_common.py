"""The parts that the FlashInfer benchmarks share: FlashInfer's own choices, times of tactics, recorded tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from common import means_us

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend
from moetune.dep_bench.flashinfer_choice import own_autotune
from moetune.inputs.presets import layer as preset
from moetune.measure.clock import Clock
from moetune.search.base import Search
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

UNSEEN = 100_000
"""No tuner uses the draws from this number on."""
DRAWS = 8


def bf16_layer(name: str) -> MoELayer:
    """Returns a preset's layer with bf16 experts, because this op cannot be tuned with DeepSeek's fp8 blocks."""
    return preset(name).model_copy(update={"precision": Precision.BF16})


def pair(values: Sequence[int]) -> Tactic:
    return Tactic(gemm1=values[0], gemm2=values[1])


def ids(tactic: Mapping[str, Any]) -> list[int]:
    return [tactic["gemm1"], tactic["gemm2"]]


def unseen_problem(layer: MoELayer, regime: Regime, rows: int, draws: int = DRAWS) -> Problem:
    routings = tuple(realize(layer, regime, rows, draw=UNSEEN + draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer), as_draws(routings), "cuda")


def warm_flashinfer() -> None:
    """Loads the op's module and builds the tuner's helper kernel, by tuning a tiny layer."""
    layer, regime = MoELayer(num_experts=8, top_k=2, hidden_size=256, intermediate_size=256), Regime()
    runner = FlashInferCutlassBackend().prepare(unseen_problem(layer, regime, 2, 1))
    own_autotune(runner)


def tactics_us(
    runner: Any, tactics: Sequence[Tactic], draws: Sequence[int], rounds: int = 5, clock: Clock | None = None
) -> list[float]:
    """Returns each tactic's time as `common.means_us` does."""
    return means_us([partial(runner.run, tactic) for tactic in tactics], draws, rounds, clock)


def searched(search: Search, runner: Any, draws: Sequence[int], clock: Clock | None = None) -> tuple[Tactic, ...]:
    """Runs a search on these draws, without tactics that raise, and returns its finalists."""
    try:
        batch = next(search)
        while True:
            used = [draws[at % len(draws)] for at in range(min(batch.rounds, len(draws)))]
            running = [tactic for tactic in batch.tactics if _runs(runner, tactic)]
            batch = search.send(dict(zip(running, tactics_us(runner, running, used, 1, clock), strict=True)))
    except StopIteration as stop:
        finalists: tuple[Tactic, ...] = stop.value
        return finalists


def _runs(runner: Any, tactic: Tactic) -> bool:
    try:
        runner.run(tactic)
    except Exception as error:
        print(f"{tactic}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return False
    return True


def pair_us(table: Mapping[str, Any], tactic: Tactic) -> float:
    """Returns a tactic's time by a recorded table, in µs.

    The table has each GEMM's time together with a fixed tactic of the other GEMM. So the time is the sum of the two
    entries, minus the time of the fixed pair, which both contain.
    """
    gemm1_us, gemm2_us = table["gemm1_us"], table["gemm2_us"]
    us: float = gemm1_us[str(tactic["gemm1"])] + gemm2_us[str(tactic["gemm2"])] - gemm1_us[str(table["fixed"][0])]
    return us
