"""Buckets are drawn and compiled ahead."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
from planted import PlantedBackend, tactic
from processes import GIVE_UP_S
from runs import tune_planted

from moetune.errors import NoResultError, UsageError
from moetune.measure.compiling import Compilers
from moetune.search.base import Batch
from moetune.spec.regime import Regime
from moetune.store.profile import Rejection
from moetune.tuning import prefetch
from moetune.tuning.bucket import Bucket
from moetune.tuning.events import (
    BucketChosen,
)


@pytest.mark.parametrize("raising", [(), ("default",)])
def test_a_default_that_was_not_compiled_ahead_is_still_run(plant, monkeypatch, raising):
    """The process that compiled it may have been killed for memory."""
    uncompiled = {tactic("default"): "killed by SIGKILL", tactic("other"): "killed by SIGKILL"}
    monkeypatch.setattr(Compilers, "wait", lambda self, *question: dict(uncompiled))
    plant(milliseconds={"default": 1.0, "other": 0.1, "fast": 0.3}, raising=frozenset(raising))
    if raising:
        with pytest.raises(NoResultError, match="planted failure"):
            tune_planted()
        return
    choice = tune_planted().choices[0]
    assert choice.tactic == tactic("fast")
    assert choice.rejected == (Rejection(tactic=tactic("other"), reason="killed by SIGKILL"),)


def test_what_a_search_would_propose_next_is_compiled_meanwhile(plant, monkeypatch):
    def search(self, problem, candidates, warm_starts):
        yield Batch((tactic("default"), tactic("fast")), likely_next=(tactic("slow"),))
        return tuple((yield Batch((tactic("default"),))))

    waited = []
    monkeypatch.setattr(Compilers, "wait", lambda self, *question: waited.append(question[3:]) or {})
    monkeypatch.setattr(PlantedBackend, "search", search, raising=False)
    plant(milliseconds={"default": 1.0, "fast": 0.1, "slow": 2.0})
    tune_planted(Regime(ladder="4"))
    assert waited == [((tactic("default"), tactic("fast")), (tactic("slow"),)), ((tactic("default"),), ())]


def test_on_a_cpu_nothing_is_drawn_while_a_bucket_is_measured(plant, monkeypatch):
    drawn = []
    real = Bucket.of

    def of(layer, regime, backend, device, rows):
        drawn.append(rows)
        return real(layer, regime, backend, device, rows)

    monkeypatch.setattr(Bucket, "of", of)
    plant(milliseconds={"default": 1.0, "fast": 0.1})
    tune_planted(on_event=lambda event: isinstance(event, BucketChosen) and event.index == 0 and drawn.append("chosen"))
    assert drawn == [4, "chosen", 8]


def test_on_a_gpu_later_buckets_are_drawn_meanwhile_and_what_fails_there_comes_in_its_turn(plant, monkeypatch):
    threads, real = {}, Bucket.of

    def of(layer, regime, backend, device, rows):
        threads[rows] = threading.current_thread()
        if rows == 8:
            raise UsageError("No such rows.")
        return real(layer, regime, backend, device, rows)

    monkeypatch.setattr(prefetch, "draws_ahead", lambda device: True)
    monkeypatch.setattr(Bucket, "of", of)
    plant(milliseconds={"default": 1.0, "fast": 0.1})
    events = []
    with pytest.raises(UsageError, match="No such rows"):
        tune_planted(on_event=events.append)
    assert [event.choice.tactic for event in events if isinstance(event, BucketChosen)] == [tactic("fast")]
    assert threads.keys() == {4, 8}
    assert threading.current_thread() not in threads.values()
    assert not any(thread.is_alive() for thread in threads.values())


SLOW_POOL = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>
void *pthreadpool_create(size_t threads) {
  void *torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  void *(*create)(size_t) = dlsym(torch, "pthreadpool_create");
  if (getenv("SLOW_US")) usleep(atoi(getenv("SLOW_US")));
  return create(threads);
}
"""
"""A library that makes PyTorch's pool of threads take `SLOW_US` microseconds to create."""
FORKED = """
import os
from types import SimpleNamespace
import torch
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.tuning.prefetch import Prefetcher
from moetune.workload.routing import realize
layer = MoELayer(name="small", num_experts=16, top_k=2, hidden_size=32, intermediate_size=16)
regime = Regime(ep_size=2, ladder="hybrid", tune_max_num_tokens=512)
realize(layer, regime, 1)  # imports what the threads need
torch.set_num_threads(1)  # as vLLM does before it forks its workers
pid = os.fork()
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os.environ["SLOW_US"] = "200000"
Prefetcher.bucket = lambda self, rows: realize(layer, regime, rows)
Prefetcher._compile_more = lambda self, drawn: None
question = SimpleNamespace(layer=layer, regime=regime, backend=None, device="cuda")
with Prefetcher(question, regime.buckets, None, "auto", None) as prefetcher:
    drawn = len(list(prefetcher.buckets()))
assert drawn == len(regime.buckets)
os._exit(0)
"""


@pytest.mark.skipif(not (sys.platform == "linux" and shutil.which("gcc")), reason="needs Linux and gcc for a library")
def test_threads_of_a_forked_process_do_not_create_pytorchs_pool_at_once(tmp_path):
    """Widened by a pool that takes long to create; on vLLM's workers it failed without that."""
    source, library = tmp_path / "slow.c", tmp_path / "slow.so"
    source.write_text(SLOW_POOL)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=GIVE_UP_S)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GIVE_UP_S)
    assert done.returncode == 0, done.stderr
