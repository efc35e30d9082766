"""Computes for how many slots vLLM asks Humming's heuristic."""

from __future__ import annotations

import math

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.dispatch import tokens_for_rows


def estimated_slots(layer: MoELayer, regime: Regime, rows: int) -> int:
    """Returns `valid_shape_m`, the slots of a rank if all experts of all ranks are equally busy.

    vLLM 0.33 (`estimate_local_valid_shape_m` in `experts/fused_humming_moe.py`) takes the tokens of all ranks times
    k·L/E, whatever reaches this one. So it is the number of slots that M rows have on average under any dispatch.
    SGLang 0.5.23 (`moe_runner/humming.py`) takes M·k, those of other ranks too.

    Args:
        layer: the layer.
        regime: the deployment.
        rows: M, the rows in the rank's kernel.
    """
    shard = regime.shard(layer)
    tokens = rows if regime.dispatch == "none" else regime.ep_size * tokens_for_rows(layer, regime, rows)
    slots = tokens * layer.top_k * shard.num_local / shard.num_physical
    return max(1, math.ceil(round(slots, 6)))  # rows of a deduplicated dispatch are a rounded number of tokens
