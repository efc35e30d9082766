"""One of two processes that start an engine at the same time; `test_two_ranks.py` starts both.

Arguments: the rank, the engine whose module is planted or `none`, the op, and a folder for both. What became of the
rank is written to `RANK.json` in that folder.
"""

import importlib
import json
import sys
import types
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ending import end_now
from flashinfer.autotuner import autotune
from flashinfer.autotuner.autotuner import AutoTuner
from stand_ins import FAST, MIDDLING, TIMES_US, PlantedClock, Trtllm
from test_cutlass import MoERunner, call, choice

import moetune
from moetune.engine import flashinfer_hook, op_bench, session
from moetune.engine.warmup import session_for
from moetune.measure import clock
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile
from moetune.tuning.events import BucketChosen

LAYER = MoELayer(name="tiny", num_experts=16, top_k=2, hidden_size=32, intermediate_size=16)
FUNCTIONS = {"vllm": "get_ep_group", "sglang": "get_moe_ep_group"}
VERSIONS = {"vllm": "0.26.0", "sglang": "0.5.23"}
MODULES = {"vllm": "vllm.distributed.parallel_state", "sglang": "sglang.srt.distributed.parallel_state"}


def plant_engine(engine: str) -> None:
    module = types.ModuleType(MODULES[engine])
    coordinator = types.SimpleNamespace(cpu_group=dist.group.WORLD)
    setattr(module, FUNCTIONS[engine], lambda: coordinator)
    sys.modules[MODULES[engine]] = module
    sys.modules[engine] = types.ModuleType(engine)
    vars(sys.modules[engine])["__version__"] = VERSIONS[engine]


def plant_tuner() -> None:
    """As the fixture `tuner`."""

    def profile(self, runner, inputs, tactic, tuning_config, input_tensor_batches=None, **kwargs):
        runner(inputs, tactic=tactic, **kwargs)
        return runner.last_us / 1e3

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(AutoTuner, "_profile_single_kernel", profile)
    patch.setattr(AutoTuner, "_get_l2_cache_size_in_bytes", lambda self, *device: 4096)
    patch.setattr(op_bench, "SECONDS", 0.001)
    patch.setattr(clock, "clock_for", lambda device: PlantedClock())


def plant_tune(rank: int) -> list[int]:
    """Replaces moetune's own tuning by one whose answer depends on the rank. Returns the buckets that it measured."""
    measured: list[int] = []

    def tune(layer, regime, backend, store, *, device, isolate, on_event, open_benches=None):
        choices = tuple(
            choice(rows).model_copy(update={"tactic": Tactic(gemm1=1000 * rank + rows, gemm2=2000 * rank + rows)})
            for rows in regime.buckets
        )
        for index, made in enumerate(choices):
            measured.append(made.rows)
            on_event(BucketChosen(made, index, len(choices)))
        environment = Environment(device="planted", strict={})
        return Profile(layer=layer, regime=regime, backend=backend, environment=environment, choices=choices)

    pytest.MonkeyPatch().setattr(importlib.import_module("moetune.tuning.tune"), "tune", tune)
    return measured


def main(rank: int, engine: str, op: str, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    plant_tuner()
    measured = plant_tune(rank)
    regime = Regime(ep_size=2, attention_dp=True, draws=4, ladder="hybrid")
    store = folder / f"store{rank}"
    if op == "cutlass":
        buckets = [1, 8, 8192]
        runner = MoERunner(LAYER, regime, rank=rank)
        run = partial(call, runner, LAYER, regime, maximum=8192)
    else:
        buckets = [1, 2, 4, 8]
        fast, middling = (40.0, 70.0) if rank == 0 else (60.0, 50.0)
        run = Trtllm(LAYER, regime, rank=rank, times_us=TIMES_US | {str(FAST): fast, str(MIDDLING): middling})
        if rank == 1:  # only this rank has stored an answer
            with moetune.warmup(LAYER, regime, store=store):
                run(8)
            AutoTuner.get().clear_cache()
    if engine != "none":
        plant_engine(engine)
    opened = session_for(LAYER, regime, store=store)
    session.set_for_process(opened)
    flashinfer_hook.install_for_process()
    before = [run(rows=rows) for rows in buckets]
    with autotune(True):
        run(rows=8)
        run(rows=8)
    chosen = [run(rows=rows) for rows in buckets]
    found = {
        "before": before,
        "measured": measured,
        "chosen": chosen,
        "served": sorted(rows for _, rows in opened.served),
        "tuned": sorted(rows for _, rows in opened.tuned),
        "missed": sorted(rows for _, rows in opened.missed),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    end_now()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
