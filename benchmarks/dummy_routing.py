"""Realizes 8192 balanced tokens beside FlashInfer's `CuteDslMoEInputsHelper`, which makes a balanced dummy too.

    python benchmarks/dummy_routing.py

Both run in this process, on the CPU, interleaved; each of moetune's is a draw not made before. Exits 1 where
moetune is less than 50 times faster.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from flashinfer.fused_moe.cute_dsl._inputs_helper import CuteDslMoEInputsHelper

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.routing import realize

TOKENS = 8192
LEAST_RATIO = 50.0
ROUNDS = 15
EP_SIZE = 8


def flashinfer_helper(layer: MoELayer) -> Callable[[], Any]:
    """One call of the helper's hook on the inputs of the CuteDSL tuner, of which it reads and replaces the ids."""
    helper = CuteDslMoEInputsHelper(layer.num_experts, layer.top_k, layer.num_experts // EP_SIZE)
    inputs = [None, None, torch.empty(TOKENS, layer.top_k, dtype=torch.int32)]
    return lambda: helper.inputs_pre_hook(inputs)


def main() -> int:
    layer = MoELayer(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
    regimes = {
        "none": Regime(ep_size=EP_SIZE, distribution="balanced"),
        "allgather": Regime(ep_size=EP_SIZE, dispatch="allgather", distribution="balanced"),
        "alltoall packed": Regime(ep_size=EP_SIZE, layout="packed", distribution="balanced"),
    }
    theirs = flashinfer_helper(layer)
    times: dict[str, list[float]] = {"FlashInfer CuteDslMoEInputsHelper": []}
    times |= {f"moetune {name}": [] for name in regimes}
    for draw in range(ROUNDS + 1):
        calls: list[Callable[[], Any]] = [theirs]
        calls += [
            lambda regime=regime, draw=draw: realize(layer, regime, TOKENS, draw=draw) for regime in regimes.values()
        ]
        for call, measured in zip(calls, times.values(), strict=True):
            start = time.perf_counter()
            call()
            measured.append((time.perf_counter() - start) * 1e3)
    print(f"{TOKENS} tokens, E {layer.num_experts}, k {layer.top_k}, ep {EP_SIZE}; {ROUNDS} interleaved rounds, ms")
    for name, measured in times.items():
        del measured[0]
        low, median, high = statistics.quantiles(measured, n=4)
        print(f"{name:36s} median {median:8.3f}   quartiles {low:.3f} … {high:.3f}")
    their_median, *medians = (statistics.median(measured) for measured in times.values())
    ratio = their_median / max(medians)
    print(f"ratio to moetune's slowest: {ratio:.0f}x (at least {LEAST_RATIO:.0f}x is required)")
    return 0 if ratio >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
