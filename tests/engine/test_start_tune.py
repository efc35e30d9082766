"""Tuning at an engine's start: it ends in time, whatever the process does that tunes, and all ranks get one answer."""

import importlib
import json
import math
import subprocess
import sys
import threading
import time
from typing import Any

import planted_tunes
import pytest
import torch
import torch.distributed as dist
from processes import GIVE_UP_S
from torch.distributed import distributed_c10d

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.engine import start_tune
from moetune.engine.ranks import first_answer
from moetune.errors import NoResultError, UsageError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.tuning.events import BucketsSkipped

LAYER = MoELayer(name="tiny", num_experts=16, top_k=2, hidden_size=32, intermediate_size=16)


@pytest.mark.parametrize(("given", "seconds"), [("", None), ("10", 10.0), ("120", 120.0), ("300", 300.0)])
def test_the_variable_is_a_number_of_seconds(given, seconds, monkeypatch):
    monkeypatch.setenv(start_tune.VARIABLE, given)
    assert start_tune.seconds() == seconds
    monkeypatch.delenv(start_tune.VARIABLE)
    assert start_tune.seconds() is None


@pytest.mark.parametrize("given", ["1", "301", "yes", "nan", "-5", "120s"])
def test_any_other_value_is_an_error_that_names_the_range(given, monkeypatch):
    monkeypatch.setenv(start_tune.VARIABLE, given)
    with pytest.raises(UsageError, match=rf"MOETUNE_TUNE_AT_START={given} is not a number of seconds from 10 to 300"):
        start_tune.seconds()


def test_nothing_is_tuned_where_the_engine_must_not_wait(monkeypatch):
    assert start_tune.obstacle() == "the engine has not set its device"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    capturing, tracing = [], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(tracing))
    assert start_tune.obstacle() is None
    capturing.append(True)
    assert start_tune.obstacle() == "a CUDA graph is being captured"
    tracing.append(True)
    assert start_tune.obstacle() == "torch.compile is tracing"


def within(limit_s, tune, monkeypatch, tmp_path):
    monkeypatch.setattr(start_tune, "_tune", getattr(planted_tunes, tune))
    return start_tune.tune_within(limit_s, LAYER, Regime(ep_size=4), "triton", str(tmp_path), "cuda:3", "mean")


@pytest.mark.parametrize(
    ("tune", "reason"),
    [
        ("finishes", None),
        ("repeats", "triton; {store}; cuda:3; mean; 240.0"),
        ("raises", "ValueError: not a MoetuneError"),
        ("is_killed", "killed by SIGKILL"),
    ],
)
def test_whatever_the_process_does_the_engine_gets_a_reason(tune, reason, monkeypatch, tmp_path):
    said = within(GIVE_UP_S, tune, monkeypatch, tmp_path)
    assert said is None if reason is None else reason.format(store=tmp_path) in said


def test_the_real_process_says_why_it_cannot_measure(tmp_path):
    asked = LAYER, Regime(ep_size=4), TritonBackend(), str(tmp_path), "cuda:99", None
    reason = start_tune.tune_within(GIVE_UP_S, *asked)
    assert "This machine has no device 'cuda:99'" in reason


def test_a_process_that_hangs_is_killed_when_its_time_ends(monkeypatch, tmp_path):
    assert within(1.0, "hangs", monkeypatch, tmp_path) == "not finished within 1 s"


def test_a_process_that_cannot_start_is_a_reason_too(monkeypatch, tmp_path):
    monkeypatch.setattr(start_tune, "Child", lambda *given: (_ for _ in ()).throw(OSError("no more processes")))
    assert within(1.0, "finishes", monkeypatch, tmp_path) == "no more processes"


@pytest.mark.parametrize(
    ("skipped", "error", "sent"),
    [
        ((), None, None),
        ((64, 128), None, "the time ended before 2 buckets"),
        ((), NoResultError("out of memory."), "out of memory."),
    ],
)
def test_the_process_sends_why_not_everything_was_tuned(skipped, error, sent, monkeypatch, tmp_path):
    asked, answers = {}, []

    def tune(*given, on_event, **named):
        asked.update(named, given=given)
        if skipped:
            on_event(BucketsSkipped(skipped))
        if error:
            raise error

    class Channel:
        send = staticmethod(answers.append)

    monkeypatch.setattr(importlib.import_module("moetune.tuning.tune"), "tune", tune)
    start_tune._tune(Channel, LAYER, Regime(ep_size=4), "triton", str(tmp_path), "cuda:0", None, 96.0)
    assert answers == [sent]
    assert asked == {
        "device": "cuda:0",
        "rank": None,
        "time_budget_s": 96.0,
        "given": (LAYER, Regime(ep_size=4), "triton", str(tmp_path)),
    }


@pytest.fixture
def ranks(monkeypatch):
    """Several threads as the ranks of one engine, with one key-value store. Returns a function that runs them."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)

    def run(*acts):
        found = [None] * len(acts)

        def rank(at):
            found[at] = acts[at]()

        threads = [threading.Thread(target=rank, args=(at,), daemon=True) for at in range(len(acts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=GIVE_UP_S)
            assert not thread.is_alive()
        return found

    return run


def test_all_ranks_get_the_answer_of_the_first(ranks):
    made = []

    def make():
        made.append(threading.get_ident())
        time.sleep(0.5)
        return f"answer {len(made)}"

    assert ranks(*[lambda: first_answer("question", make, GIVE_UP_S)] * 4) == ["answer 1"] * 4
    assert first_answer("question", make, GIVE_UP_S) == "answer 1", "also later"
    assert first_answer("another", make, GIVE_UP_S) == "answer 2"
    assert len(made) == 2


def test_an_error_of_the_first_rank_does_not_keep_the_others(ranks):
    begun = threading.Event()

    def raising():
        begun.set()
        time.sleep(0.5)
        raise NoResultError("out of memory")

    def first():
        with pytest.raises(NoResultError):
            first_answer("question", raising, math.inf)

    def second():
        begun.wait(timeout=GIVE_UP_S)
        return first_answer("question", lambda: "never", math.inf)  # without an answer it would not end

    assert ranks(first, second) == [None, None]


def test_a_rank_waits_no_longer_than_it_may(ranks):
    done = threading.Event()

    def slow():
        done.wait(timeout=GIVE_UP_S)
        return "late"

    def second():
        while not begun.is_set():
            time.sleep(0.01)
        found = first_answer("question", lambda: "never", 0.3)
        done.set()
        return found

    begun = threading.Event()

    def first():
        return first_answer("question", lambda: begun.set() or slow(), GIVE_UP_S)

    assert ranks(first, second) == ["late", None]
    assert first_answer("question", lambda: "never", 0.3) == "late"


RANK = """
import os
import sys
from datetime import timedelta
import torch.distributed as dist
from moetune.engine.ranks import first_answer
rank, address = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=5))
print(first_answer("question", lambda: f"of process {os.getpid()}", 300.0), flush=True)
print(first_answer(f"question of {rank}", lambda: f"of rank {rank}", 0.0), flush=True)
dist.barrier()
"""


def test_the_processes_of_torch_distributed_are_asked(tmp_path):
    address = f"file://{tmp_path}/rendezvous"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), address],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=GIVE_UP_S)[0].splitlines() for process in started]
    assert printed[0][0] == printed[1][0]
    assert printed[0][0] in [f"of process {process.pid}" for process in started]
    assert [lines[1] for lines in printed] == ["of rank 0", "of rank 1"], "nobody waits for a rank that does not ask"


def test_without_torch_distributed_each_process_answers_itself():
    assert [first_answer("question", lambda: "own", 0.0) for _ in range(2)] == ["own", "own"]


def test_a_rank_without_an_answer_uses_its_own_store(ranks, monkeypatch):
    monkeypatch.setattr(start_tune, "first_answer", lambda name, make, limit_s: None)
    own: Any = object()
    assert start_tune.found("question", 10.0, lambda: (own, ", 4 buckets"), None) == (
        own,
        ", 4 buckets (the rank that tunes has not answered)",
    )
    assert start_tune.found("question", 10.0, lambda: None, None) == (None, " (the rank that tunes has not answered)")


def test_the_answer_of_no_profile_is_one_too(ranks, monkeypatch):
    monkeypatch.setattr(start_tune, "obstacle", lambda: None)
    reasons = ranks(*[lambda: start_tune.found("question", 10.0, lambda: None, lambda: "out of memory " * 50)] * 2)
    (profile, said), again = reasons
    assert (profile, again) == (None, (None, said))
    assert said.startswith(" (not all tuned: out of memory ")
    assert len(said) < 150
    assert json.dumps(said)
