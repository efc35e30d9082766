"""One of two ranks of NCCL, each on its own GPU, that tune `cutlass_fused_moe` in a warm-up.

Arguments: the rank, the scenario (`tunes`, `broadcast` or `dies`), the address of rank 0, a folder for both, and `cuda`
or `cpu`. What became of the rank is written to `SCENARIO-RANK.json`. With `cpu` the op is planted, and gloo stands in
for NCCL, which tests this program.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ending import end_now
from flashinfer.autotuner import AutoTuner, get_autotune_process_group

import moetune
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

RANKS = 2
TIMEOUT_S = 10.0
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=1024, intermediate_size=512)
REGIME = Regime(ep_size=RANKS, attention_dp=True, ladder="hybrid", tune_max_num_tokens=max(BUCKETS), draws=2)


def real_op(rank: int) -> Callable[[int], list[int]]:
    """Returns a function that runs the op with a number of rows, and returns the tactics of its two GEMMs."""
    from flashinfer.fused_moe import cutlass_fused_moe

    from moetune.backends.base import Problem
    from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend
    from moetune.workload.draws import as_draws
    from moetune.workload.routing import realize

    backend, device = FlashInferCutlassBackend(), f"cuda:{rank}"

    def op(rows: int) -> list[int]:
        draws = as_draws((realize(LAYER, REGIME, rows, rank, 0),))
        runner = backend.prepare(Problem(LAYER, REGIME, rows, REGIME.shard(LAYER, rank), draws, device))
        tuner, chosen = AutoTuner.get(), []
        choose_one = tuner.choose_one

        def recorded(*args, **kwargs):
            found = choose_one(*args, **kwargs)
            chosen.append(found[1])
            return found

        tuner.choose_one = recorded
        try:
            cutlass_fused_moe(**runner.arguments(0))
        finally:
            del tuner.choose_one
        torch.cuda.synchronize()
        return chosen

    return op


def planted_op(rank: int) -> Callable[[int], list[int]]:
    """Returns what stands for the op on a machine without GPUs."""
    import four_ranks
    from test_cutlass import call

    torch.cuda.is_current_stream_capturing = lambda: False
    backend = dist.get_backend
    dist.get_backend = lambda group=None: dist.Backend("nccl") if group is dist.group.WORLD else backend(group)
    four_ranks.LAYER = LAYER
    runner, _ = four_ranks.planted_cutlass(rank, REGIME)
    return lambda rows: call(runner, LAYER, REGIME, rows, max(BUCKETS))


def tuned(rank: int, scenario: str, folder: Path, op: Callable[[int], list[int]]) -> dict[str, object]:
    """Tunes the op in a warm-up of both ranks. In the scenario `dies`, rank 1 ends inside, before it calls the op."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("moetune").addHandler(handler)
    began = time.monotonic()
    with moetune.warmup(
        LAYER,
        REGIME,
        rank=rank,
        group=dist.group.WORLD,
        store=folder / "store",
        strategy="broadcast" if scenario == "broadcast" else "merge",
        timeout_s=TIMEOUT_S,
    ) as seen:
        flashinfers = get_autotune_process_group()
        if scenario == "dies" and rank == 1:
            os._exit(9)
        op(max(BUCKETS))
    return {
        "took_s": time.monotonic() - began,
        "chosen": [op(rows) for rows in BUCKETS],
        "served": sorted(rows for _, rows in seen.served),
        "tuned": sorted(rows for _, rows in seen.tuned),
        "missed": sorted({rows for _, rows in seen.missed}),
        "lost": seen.lost,
        "lines": lines,
        "flashinfers_group": [flashinfers is dist.group.WORLD, flashinfers and str(flashinfers.name())],
    }


def main(rank: int, scenario: str, address: str, folder: Path, device: str) -> None:
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=address,
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=300),
        device_id=torch.device("cuda", rank) if cuda else None,
    )
    number = torch.ones(1, device=f"cuda:{rank}" if cuda else "cpu")
    dist.all_reduce(number)
    found = tuned(rank, scenario, folder, real_op(rank) if cuda else planted_op(rank))
    if scenario != "dies":
        dist.all_reduce(number)  # the group of the engine still works
        found["sum"] = float(number)
    (folder / f"{scenario}-{rank}.json").write_text(json.dumps(found))
    end_now()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5])
