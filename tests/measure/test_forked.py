"""A tune in a forked copy of a process that has used torch says so instead of hanging."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import GIVE_UP_S

from moetune.errors import UnsupportedError
from moetune.measure import forked

SCRIPT = """
import os, sys, tempfile
import torch
from planted import LAYER, PlantedBackend
from moetune.errors import UnsupportedError
from moetune.measure import forked
from moetune.spec.regime import Regime
from moetune.tuning.tune import tune

def tuned(threads):
    sys.stdout.flush()
    if os.fork():
        return os.wait()
    torch.set_num_threads(threads)
    try:
        regime = Regime(ladder="4", draws=1)
        backend = PlantedBackend({"default": 1.0})
        profile = tune(LAYER, regime, backend, tempfile.mkdtemp(), device="cpu", isolate=False)
        print(threads, len(profile.choices), flush=True)
    except UnsupportedError as error:
        print(threads, error, flush=True)
    os._exit(0)

assert not forked._is_forked()
torch.set_num_threads(2)
tuned(2)
torch.ones(1 << 20).add_(1.0)
forked.TRY_S = 3.0
tuned(2)
tuned(1)
"""

GPU_PART = """
torch.set_num_threads(4)
torch.ones(1 << 20).add_(1.0)
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
profile = tune(LAYER, Regime(ladder="4096", draws=2), "torch", tempfile.mkdtemp(), device="cuda", isolate=False)
print(torch.get_num_threads(), len(profile.choices), torch.get_num_threads(), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_tune_in_a_forked_process_works_or_says_why_it_would_hang():
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    before, hanging, single = ran.stdout.splitlines()
    assert before == "2 1"
    assert "forked from one that had already used torch: its threads do not exist here" in hanging
    assert "spawn" in hanging
    assert single == "1 1"


def test_cuda_that_was_initialized_before_the_fork_is_named(monkeypatch):
    monkeypatch.setattr(forked, "_is_forked", lambda: True)
    monkeypatch.setattr(forked, "_hangs", lambda: False)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(UnsupportedError, match="CUDA cannot be initialized again"), forked.working_torch("cuda"):
        pass
    with forked.working_torch("cpu"):
        pass


@pytest.mark.parametrize("device", ["cuda", None])
def test_on_a_gpu_a_forked_process_gets_one_thread_for_the_tune(monkeypatch, device):
    monkeypatch.setattr(forked, "_is_forked", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with forked.working_torch(device):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_forked_process_tunes_on_the_gpu_as_vllms_engine_core_does():
    script = SCRIPT.partition("def tuned")[0] + GPU_PART
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "4"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=GIVE_UP_S,
    )
    assert ran.stdout.splitlines() == ["4 1 4"]
