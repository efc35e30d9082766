"""Several processes that run the block over gloo; `test_dispatchers.py` starts this program.

Arguments: the number of ranks, a folder, and the backend: `torch`, or `triton` under its interpreter. Rank 0 writes
what was found to `found.json` in that folder. torch is imported once, and then each rank is forked.
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ending import end_now
from interpreted import replace_parts_of_the_interpreter

from moetune.backends.reference import relative_error
from moetune.backends.registry import backend
from moetune.dep_bench.block import Block
from moetune.dep_bench.dispatchers import dispatcher_for
from moetune.dep_bench.experts import Experts
from moetune.dep_bench.payload import Format
from moetune.dep_bench.process_group import Ranks
from moetune.dep_bench.reference import block_reference
from moetune.dep_bench.router import Router
from moetune.engine.exchange import exchange_of
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

LAYER = MoELayer(name="tiny", num_experts=10, top_k=3, hidden_size=32, intermediate_size=16, precision="fp32")
BF16 = MoELayer(name="bf16", num_experts=8, top_k=2, hidden_size=128, intermediate_size=128)
SPARSE = MoELayer(name="sparse", num_experts=4, top_k=1, hidden_size=32, intermediate_size=16, precision="fp32")
LAYERS = {"torch": LAYER, "triton": BF16}
TOKENS = 6
LOADS = ("allgather", "deduplicated", "slot", "pool")
WIRES = (("bf16", None), ("bf16", "topk"), ("bf16", "packed_topk"), ("fp4", None), ("fp4", "packed_topk"))


def regime_of(load: str, size: int) -> Regime:
    fields = {"dispatch": "allgather"} if load == "allgather" else {"layout": load}
    return Regime(ep_size=size, uneven_shards=True, draws=1, ladder="8", **fields)


def found_of(
    ranks: Ranks, name: str, load: str, activation: str, routing: str | None, tokens: int = TOKENS
) -> dict[str, object]:
    layer = LAYERS[name] if tokens == TOKENS else SPARSE
    regime = regime_of(load, ranks.size)
    form = Format.of(layer, regime, activation, routing)
    router = Router(layer, "zipf:0.5", 3, "cpu")
    mine = backend(name)
    experts = Experts(mine, layer, regime, ranks.rank, "cpu")
    block = Block(layer, regime, form, router, dispatcher_for(ranks, form, layer, regime), experts)
    x = torch.randn(tokens, layer.hidden_size, generator=torch.Generator().manual_seed(ranks.rank))
    x = x.to(experts.inputs(1).x.dtype)
    parts: list[str] = []
    out = block.run(x, lambda rows: mine.heuristic(layer, regime, rows), parts.append)
    error = relative_error(out, block_reference(backend(name), layer, regime, form, router, x))
    ids, _ = router.top_k(router.logits(x))
    rows, received = block.arrived
    return {"error": error, "ids": ids.tolist(), "rows": rows, "received": received, "parts": parts}


def main(rank: int, size: int, folder: Path, name: str) -> None:
    if name == "triton":
        replace_parts_of_the_interpreter()
    where = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    ranks = Ranks(rank, size, "cpu", exchange_of(dist.group.WORLD))
    found = {
        f"{load} {activation} {routing}": ranks.gather(found_of(ranks, name, load, activation, routing))
        for load in LOADS
        for activation, routing in WIRES
    }
    if name == "torch":  # with one token and one expert a rank, some ranks get nothing
        for load in LOADS:
            found[f"{load} sparse"] = ranks.gather(found_of(ranks, name, load, "bf16", None, tokens=1))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    end_now()


if __name__ == "__main__":
    size, folder, name = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            try:
                main(rank, size, folder, name)
            finally:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
