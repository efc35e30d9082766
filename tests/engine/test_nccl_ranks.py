"""Two ranks of NCCL on two GPUs tune `cutlass_fused_moe` in a warm-up. Without GPUs the same program runs on gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nccl_ranks import BUCKETS, TIMEOUT_S

from moetune.store.store import Store

PROGRAM = Path(__file__).with_name("nccl_ranks.py")
LIMIT_S = 200.0
"""How long the survivor of a lost rank may take beyond the time-out. It loads FlashInfer's module."""


@pytest.fixture(
    scope="module",
    params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)],
)
def device(request):
    if request.param == "cuda":
        from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend

        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        if obstacle := FlashInferCutlassBackend().unavailable():
            pytest.skip(obstacle[0])
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device):
    return tmp_path_factory.mktemp(device)


def started(scenario, folder, device):
    """What became of both ranks, None for one that has ended, and their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    paths = [str(PROGRAM.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MOETUNE_PACKAGED_PROFILES": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROGRAM), str(rank), scenario, address, str(folder), device],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    files = [folder / f"{scenario}-{rank}.json" for rank in range(2)]
    found = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return found, [process.returncode for process in processes], errors


def test_both_ranks_tune_together_and_the_next_start_is_served(folder, device):
    (first, second), codes, errors = started("tunes", folder, device)
    assert codes == [0, 0], errors
    assert first["chosen"] == second["chosen"]
    assert first["tuned"] == second["tuned"] == list(BUCKETS), first["lines"]
    assert first["lost"] == second["lost"] == ""
    assert first["flashinfers_group"] == second["flashinfers_group"] == [False, "gloo"]
    assert first["sum"] == second["sum"] == 4.0, "the engine's own group still works"
    ((_, profile),) = Store(folder / "store", packaged=folder / "none").profiles()
    assert [[choice.tactic["gemm1"], choice.tactic["gemm2"]] for choice in profile.choices] == first["chosen"]

    (again, other), codes, errors = started("broadcast", folder, device)
    assert codes == [0, 0], errors
    assert again["served"] == other["served"] == list(BUCKETS)
    assert again["chosen"] == other["chosen"] == first["chosen"]


def test_a_rank_that_has_ended_keeps_the_other_waiting_no_longer_than_the_time_out(folder, device):
    (first, second), codes, errors = started("dies", folder, device)
    assert (codes, second) == ([0, 9], None), errors
    assert first["lost"].startswith(f"Rank 1 of 2 gave no sign of life for {TIMEOUT_S:g} s")
    assert first["missed"] == list(BUCKETS)
    assert TIMEOUT_S < first["took_s"] < TIMEOUT_S + LIMIT_S
