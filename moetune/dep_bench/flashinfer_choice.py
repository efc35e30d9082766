"""What FlashInfer's own autotuner chooses for `cutlass_fused_moe`."""

from __future__ import annotations

import time
from typing import Any

from moetune.backends.base import Backend, Problem
from moetune.dep_bench.experts import without_dispatch
from moetune.spec.ladder import Ladder
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

LADDER = Ladder(name="hybrid")
"""The buckets of FlashInfer's tuner for this op."""


def flashinfer_choices(backend: Backend, layer: MoELayer, regime: Regime, device: str) -> dict[int, Tactic]:
    """Tunes the op as an engine's warm-up does, and returns FlashInfer's tactic for each bucket of `LADDER`.

    Args:
        backend: `flashinfer-cutlass`.
        layer, regime: the deployment. The tuner makes its own inputs, so only the shapes matter.
        device: the torch device.
    """
    shaped = regime if regime.layout == "slot" else without_dispatch(regime)

    def runner(rows: int) -> Any:
        routing = realize(layer, shaped, rows)
        problem = Problem(layer, shaped, rows, shaped.shard(layer), as_draws([routing]), device)
        return backend.prepare(problem)

    buckets = LADDER.buckets(regime.tune_max_num_tokens)
    own_autotune(runner(buckets[-1]))
    return {rows: own_pick(runner(rows)) for rows in buckets}


def own_autotune(runner: Any) -> float:
    """Tunes the runner's op with FlashInfer's autotune over all of its buckets, and returns the seconds it took."""
    import torch
    from flashinfer.autotuner import autotune
    from flashinfer.fused_moe import cutlass_fused_moe

    torch.cuda.synchronize()
    begin = time.perf_counter()
    with autotune(True):
        cutlass_fused_moe(**runner.arguments())
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def own_pick(runner: Any) -> Tactic:
    """Returns the tactic that FlashInfer now runs for this problem."""
    from flashinfer.autotuner import AutoTuner
    from flashinfer.fused_moe import cutlass_fused_moe

    tuner, picks = AutoTuner.get(), []
    choose_one = tuner.choose_one

    def recorded(*args: Any, **kwargs: Any) -> Any:
        chosen = choose_one(*args, **kwargs)
        picks.append(chosen[1])
        return chosen

    tuner.choose_one = recorded
    try:
        cutlass_fused_moe(**runner.arguments())
    finally:
        del tuner.choose_one
    gemm1, gemm2 = picks
    return Tactic(gemm1=gemm1, gemm2=gemm2)
