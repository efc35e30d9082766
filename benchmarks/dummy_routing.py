"""Times how long moetune and FlashInfer's `CuteDslMoEInputsHelper` take to make a balanced routing of 8192 tokens.

    python benchmarks/dummy_routing.py

Both run in this process, on the CPU, interleaved. Exits 1 if moetune is less than 50 times faster.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial

import torch
from common import quartiles_line, wall_us
from flashinfer.fused_moe.cute_dsl._inputs_helper import CuteDslMoEInputsHelper

from moetune.measure.clock import TimedCall
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.routing import Routing, realize

TOKENS = 8192
LEAST_RATIO = 50.0
ROUNDS = 15
EP_SIZE = 8


def flashinfer_helper(layer: MoELayer) -> TimedCall:
    """Returns a call of the helper's hook on the inputs of the CuteDSL tuner; it reads and replaces the ids."""
    helper = CuteDslMoEInputsHelper(layer.num_experts, layer.top_k, layer.num_experts // EP_SIZE)
    inputs = [None, None, torch.empty(TOKENS, layer.top_k, dtype=torch.int32)]
    return lambda draw: helper.inputs_pre_hook(inputs)


def realized(layer: MoELayer, regime: Regime, draw: int) -> Routing:
    """Makes moetune's sampled routing. The warm-up and the first round have the same draw; all others are new."""
    return realize(layer, regime, TOKENS, draw=draw)


def main() -> int:
    layer = MoELayer(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
    regimes = {
        "none": Regime(ep_size=EP_SIZE, distribution="balanced"),
        "allgather": Regime(ep_size=EP_SIZE, dispatch="allgather", distribution="balanced"),
        "alltoall packed": Regime(ep_size=EP_SIZE, layout="packed", distribution="balanced"),
    }
    theirs = flashinfer_helper(layer)
    calls: dict[str, TimedCall] = {"FlashInfer CuteDslMoEInputsHelper": theirs}
    calls |= {f"moetune {name}": partial(realized, layer, regime) for name, regime in regimes.items()}
    times = dict(zip(calls, wall_us(list(calls.values()), range(ROUNDS)), strict=True))
    print(f"{TOKENS} tokens, E {layer.num_experts}, k {layer.top_k}, ep {EP_SIZE}; {ROUNDS} interleaved rounds, µs")
    for name, measured in times.items():
        print(quartiles_line(name, measured, 36))
    their_median, *medians = (statistics.median(measured) for measured in times.values())
    ratio = their_median / max(medians)
    print(f"ratio to moetune's slowest: {ratio:.0f}x (at least {LEAST_RATIO:.0f}x is required)")
    return 0 if ratio >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
