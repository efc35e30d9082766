"""A tune in a forked copy of a process that has used torch says so instead of hanging."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    with pytest.raises(UnsupportedError, match="CUDA cannot be initialized again"):
        forked.require_working_torch("cuda")
    forked.require_working_torch("cpu")
