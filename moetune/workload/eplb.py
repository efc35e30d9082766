"""Places redundant experts by load, as the expert-parallel load balancers (EPLB) of the engines do. Imports no torch.

All three engines use the two steps of DeepSeek's EPLB (github.com/deepseek-ai/EPLB):

1. Replication: each redundant expert is a copy of the expert whose load per copy is the highest.
2. Packing: the copies, from the highest load to the lowest, go to the rank with the least load that has room.

They differ where loads tie, and in nodes:

- vLLM (`DefaultEplbPolicy`, vllm/distributed/eplb/policy/default.py) and SGLang (`eplb_algorithms/deepseek.py`) take
  the lower number of two experts with equal load. If a rank has one expert only, they keep the order of the first step.
  For grouped routers they first pack the groups to nodes, if the nodes divide the groups. moetune knows no nodes and
  computes what they do on one node.
- TensorRT-LLM (`doReplication`, `doPlacement` in cpp/tensorrt_llm/runtime/moeLoadBalancer/moeLoadBalancer.cpp) copies
  the higher number of two experts with equal load, and knows no nodes.

The engines balance the loads that they have counted. Here these are the expected loads.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from moetune.errors import UsageError
from moetune.spec.enums import Eplb


def placement(loads: Sequence[float], num_physical: int, ep_size: int, engine: Eplb) -> tuple[int, ...]:
    """Returns the expert of each physical expert, ordered by rank and by its place on the rank.

    Args:
        loads: the load of each expert.
        num_physical: the number of physical experts, at least the number of experts.
        ep_size: the number of ranks; each gets equally many physical experts.
        engine: the engine whose balancer it is.

    Raises:
        UsageError: ep_size does not divide the physical experts; no engine's balancer accepts that.
    """
    if num_physical % ep_size:
        raise UsageError(
            f"A balancer gives all ranks equally many experts, but ep_size = {ep_size} does not divide the "
            f"{num_physical} physical experts.",
            "Choose another number of redundant experts.",
        )
    copies = _replicas(loads, num_physical, higher_first=engine == "trtllm")
    counts = Counter(copies)
    each = [loads[expert] / counts[expert] for expert in copies]
    room = num_physical // ep_size
    if room == 1 and engine != "trtllm":
        return tuple(copies)
    order = sorted(range(num_physical), key=lambda copy: (-each[copy], copies[copy] if engine == "trtllm" else copy))
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    emptiest = [(0.0, rank) for rank in range(ep_size)]
    for copy in order:
        load, rank = heapq.heappop(emptiest)
        ranks[rank].append(copies[copy])
        if len(ranks[rank]) < room:
            heapq.heappush(emptiest, (load + each[copy], rank))
    return tuple(expert for experts in ranks for expert in experts)


def _replicas(loads: Sequence[float], num_physical: int, *, higher_first: bool) -> list[int]:
    """Returns the expert of each physical expert before it is packed: all experts once, then the further copies."""
    sign = -1 if higher_first else 1
    busiest = [(-load, sign * expert) for expert, load in enumerate(loads)]
    heapq.heapify(busiest)
    copies, counts = list(range(len(loads))), [1] * len(loads)
    for _ in range(num_physical - len(loads)):
        expert = sign * busiest[0][1]
        copies.append(expert)
        counts[expert] += 1
        heapq.heapreplace(busiest, (-loads[expert] / counts[expert], sign * expert))
    return copies
