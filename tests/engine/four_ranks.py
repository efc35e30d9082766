"""Four processes of gloo that tune one op together; `test_four_ranks.py` starts this program.

Arguments: a folder, then the names of scenarios, which run one after the other. What became of rank R in a scenario is
written to `SCENARIO-R.json` in the folder. FlashInfer is imported once, and then each rank is forked.
"""

import json
import logging
import os
import signal
import socket
import sys
import time
import types
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ending import end_now
from flashinfer.autotuner import autotune, get_autotune_process_group
from flashinfer.autotuner.autotuner import AutoTuner
from planted import PlantedBackend
from planted_benches import PlantedBenches
from processes import eventually
from stand_ins import FAST, MIDDLING, SLOW, TIMES_US, Trtllm
from test_cutlass import MoERunner, call
from two_ranks import plant_tuner

import moetune
from moetune.backends import registry
from moetune.backends.base import Candidates
from moetune.measure import worker
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.store import Store

LAYER = MoELayer(name="tiny", num_experts=16, top_k=2, hidden_size=32, intermediate_size=16)
REGIME = Regime(ep_size=4, attention_dp=True, draws=4, ladder="hybrid", tune_max_num_tokens=8)
RANKS = 4
TIMEOUT_S = 5.0
BUCKETS = (1, 2, 4, 8)


class Rank:
    """One rank in one scenario."""

    def __init__(self, rank: int, scenario: str, folder: Path) -> None:
        self.rank, self.path = rank, folder / f"{scenario}-{rank}.json"
        self.store = folder / scenario
        self.op = Trtllm(LAYER, REGIME, rank=rank)
        self.saved: list[int] = []
        self.lines: list[str] = []
        self.swept: list[object] = []
        self.timeout_s = 120.0

    def tune(self, strategy="merge", op=None, act=None):
        """Tunes an op in a warm-up of all ranks, and writes what became of it."""
        op = op or self.op
        self.swept.clear()
        began = time.monotonic()
        with moetune.warmup(
            LAYER,
            REGIME,
            rank=self.rank,
            group=dist.group.WORLD,
            store=self.store,
            strategy=strategy,
            timeout_s=self.timeout_s,
        ) as seen:
            self.has_flashinfers_group = get_autotune_process_group() is dist.group.WORLD
            (act or op)()
            took_s = time.monotonic() - began
        found = {
            "chosen": [op(rows=rows) for rows in BUCKETS],
            "served": sorted(rows for _, rows in seen.served),
            "tuned": sorted(rows for _, rows in seen.tuned),
            "missed": sorted(rows for _, rows in seen.missed),
            "runs": len(op.runner.seen),
            "swept": self.swept,
            "saved": self.saved,
            "lost": seen.lost,
            "lines": self.lines,
            "took_s": took_s,
            "has_flashinfers_group": self.has_flashinfers_group,
        }
        self.path.write_text(json.dumps(found))

    def knows(self, buckets, store, tactic=FAST):
        """Lets this rank alone store an answer for the first buckets."""
        op = Trtllm(LAYER, REGIME, rank=self.rank, maximum=max(buckets), times_us=TIMES_US | {str(tactic): 10.0})
        with moetune.warmup(LAYER, REGIME, rank=self.rank, store=store):
            op()
        AutoTuner.get().clear_cache()
        self.saved.clear()


def cold(at: Rank) -> None:
    at.tune()


def again(at: Rank) -> None:
    """The store of `cold` answers."""
    at.store = at.store.with_name("cold")
    at.tune()


def warm(at: Rank) -> None:
    """Only rank 1 has stored an answer, and another one than all ranks together choose."""
    at.store = at.store.with_name(f"warm-store-{at.rank}")
    if at.rank == 1:
        at.knows(BUCKETS, at.store, MIDDLING)
    at.tune()


def partly(at: Rank) -> None:
    """All ranks have stored two buckets, and rank 3 has stored all."""
    at.store = at.store.with_name(f"partly-store-{at.rank}")
    at.knows(BUCKETS if at.rank == 3 else BUCKETS[:2], at.store)
    at.tune()


def raises(at: Rank) -> None:
    if at.rank == 2:
        plant(at, FAST, RuntimeError("planted"))
    at.tune()


def memory(at: Rank) -> None:
    if at.rank == 1:
        plant(at, FAST, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    at.tune()


def default_fails(at: Rank) -> None:
    if at.rank == 3:
        plant(at, -1, RuntimeError("planted"))
    at.tune()


def inputs_fail(at: Rank) -> None:
    """Rank 2 has no memory for the inputs of its sweep."""
    if at.rank == 2:

        def hook(tensors):
            raise RuntimeError("planted")

        at.op.hook = hook
    at.tune()


def slow(at: Rank) -> None:
    """Rank 3 is ten times slower. By the mean of the ranks FAST would win."""
    if at.rank == 3:
        at.op.times_us.update({"-1": 1000.0, str(SLOW): 1500.0, str(FAST): 850.0, str(MIDDLING): 700.0})
    else:
        at.op.times_us.update({"-1": 150.0, str(SLOW): 150.0, str(FAST): 50.0, str(MIDDLING): 140.0})
    at.tune()


def differing(at: Rank) -> None:
    """Makes the fastest tactic of rank 0 another one than that of the others."""
    if at.rank == 0:
        at.op.times_us.update({str(FAST): 95.0, str(MIDDLING): 40.0})


def broadcast(at: Rank) -> None:
    differing(at)
    at.tune("broadcast")


def independent(at: Rank) -> None:
    differing(at)
    at.store = at.store.with_name(f"independent-store-{at.rank}")
    at.tune("independent")


def parallel(at: Rank) -> None:
    at.tune("parallel")


def planted_cutlass(rank: int, regime: Regime) -> tuple[MoERunner, PlantedBenches]:
    """`cutlass_fused_moe`'s runner, and benches on which `moetune.tune` tunes it. Rank 3 is ten times slower."""
    fast, middling, default = (Tactic(gemm1=number, gemm2=10 + number) for number in (1, 2, -1))
    us = {default: 100.0, fast: 50.0, middling: 70.0}
    if rank == 3:
        us = {default: 1000.0, fast: 850.0, middling: 700.0}

    @dataclass
    class Planted(PlantedBackend):
        def candidates(self, layer, regime, rows, device):
            return Candidates((default, fast, middling))

        def default(self, layer, regime, rows):
            return default

    benches = PlantedBenches(lambda tactic: us[tactic])
    registry.backend = lambda name, **options: Planted({}, name=name)
    worker.open_benches = benches.open_benches
    return MoERunner(LAYER, regime, rank=rank), benches


def cutlass(at: Rank, strategy: str = "merge") -> None:
    """`cutlass_fused_moe`, which `moetune.tune` tunes."""
    runner, benches = planted_cutlass(at.rank, REGIME)

    class Op:
        def __init__(self):
            self.runner = types.SimpleNamespace(seen=benches.asked)

        def __call__(self, rows=8):
            return call(runner, LAYER, REGIME, rows)

    at.tune(strategy, op=Op())


def cutlass_broadcast(at: Rank) -> None:
    cutlass(at, "broadcast")


def other_cache(at: Rank) -> None:
    """Only rank 1 has tuned an op by FlashInfer before."""
    if at.rank == 1:
        with autotune(True):
            Trtllm(LAYER, REGIME, rank=at.rank, op="flashinfer::trtllm_bf16_moe")()
    at.tune()


def absent(at: Rank) -> None:
    """Rank 3 never calls the op."""
    at.timeout_s = TIMEOUT_S
    at.tune(act=(lambda: None) if at.rank == 3 else None)


def other_op(at: Rank) -> None:
    """Rank 1 calls another op than the others."""
    at.timeout_s = TIMEOUT_S
    at.tune(op=Trtllm(LAYER, REGIME, rank=at.rank, op="flashinfer::trtllm_bf16_moe") if at.rank == 1 else None)


def dies(at: Rank, dying: int = 2) -> None:
    """Rank 2 is killed in the final comparison of its second op. The first one has been tuned."""
    at.timeout_s = TIMEOUT_S
    second = Trtllm(LAYER, REGIME, rank=at.rank, op="flashinfer::trtllm_bf16_moe")
    if at.rank == dying:
        forward, runner = type(second.runner).forward, second.runner

        def killed(inputs, tactic=-1, do_preparation=False, **named):
            if len(runner.seen) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(runner, inputs, tactic, do_preparation, **named)

        vars(runner)["forward_cache"] = runner.forward = killed

    def both():
        at.op()
        second()

    at.tune(op=second, act=both)
    found = json.loads(at.path.read_text())
    found["first"] = [at.op(rows=rows) for rows in BUCKETS]
    at.path.write_text(json.dumps(found))


def holder_dies(at: Rank) -> None:
    """Rank 0, whose process holds the key-value store, is killed."""
    dies(at, dying=0)


def plant(at: Rank, failing: object, error: Exception) -> None:
    forward, runner = type(at.op.runner).forward, at.op.runner

    def raising(inputs, tactic=-1, do_preparation=False, **named):
        if not do_preparation and (tactic == failing or (tactic != -1 and list(tactic) == failing)):
            raise error
        return forward(runner, inputs, tactic, do_preparation, **named)

    runner.forward = raising


def main(rank: int, address: str, folder: Path, scenarios: list[str]) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    plant_tuner()
    save, profile = Store.save, AutoTuner._profile_single_kernel
    for scenario in scenarios:
        AutoTuner.get().clear_cache()
        at = Rank(rank, scenario, folder)

        def saving(store, profile, at=at, **options):
            at.saved.append(len(profile.choices))
            return save(store, profile, **options)

        handler = logging.Handler()
        handler.emit = lambda record, at=at: at.lines.append(record.getMessage())
        logger = logging.getLogger("moetune")
        logger.addHandler(handler)
        Store.save = saving
        AutoTuner._profile_single_kernel = lambda tuner, runner, inputs, tactic, *args, at=at, **named: (
            at.swept.append(tactic) or profile(tuner, runner, inputs, tactic, *args, **named)
        )
        globals()[scenario](at)
        logger.removeHandler(handler)
        if scenario not in ("dies", "holder_dies"):
            dist.barrier()
        elif rank == 0:  # its process holds the key-value store, which the others still read
            others = [folder / f"{scenario}-{other}.json" for other in (1, 3)]
            assert eventually(lambda others=others: all(path.exists() for path in others))
    end_now()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    children = []
    for number in range(RANKS):
        child = os.fork()
        if not child:
            try:
                main(number, address, folder, sys.argv[2:])
            finally:
                logging.getLogger("moetune").exception("rank %d", number)
                os._exit(1)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    with suppress(BrokenPipeError):
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]))
