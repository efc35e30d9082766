"""A run that was interrupted goes on where it stopped."""

import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from planted import LAYER, PlantedBackend, PlantedRunner, tactic
from processes import GIVE_UP_S, children, eventually
from runs import REGIME, tune_planted

import moetune.store.journal as journal_module
import moetune.store.store as store_module
from moetune.errors import MissError, NoResultError
from moetune.measure.probe import environment
from moetune.search.base import Batch
from moetune.spec.regime import Regime
from moetune.store.profile import Rejection
from moetune.store.store import Store
from moetune.tuning.bucket_tuner import BucketTuner
from moetune.tuning.events import (
    BucketChosen,
    BucketStarted,
    Resumed,
    TacticMeasured,
)
from moetune.tuning.tune import tune


def _interrupt_at(rows):
    """Interrupts once something of the search of that bucket is known."""

    def interrupt(event):
        if isinstance(event, TacticMeasured) and event.rows == rows:
            raise KeyboardInterrupt

    return interrupt


def _journals(root):
    return list(root.glob("*/*/*/*.journal.jsonl"))


def test_an_interrupted_run_resumes_at_the_next_bucket(plant):
    backend = plant(milliseconds={"default": 1.0})

    def interrupt(event):
        if isinstance(event, BucketChosen):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_planted(on_event=interrupt)
    assert backend.prepared == [4]
    with pytest.raises(MissError, match="buckets 8"):
        tune_planted(frozen=True)
    events = []
    assert len(tune_planted(on_event=events.append).choices) == 2
    assert backend.prepared == [4, 8]
    assert [event.rows for event in events if isinstance(event, BucketStarted)] == [8]


def test_what_failed_before_an_interrupt_is_not_run_again_and_keeps_its_reason(plant, tmp_path):
    times = {"default": 4.0, "fast": 1.0, "broken": 0.1}
    plant(milliseconds=times, raising=frozenset({"broken"}))
    regime = Regime(ladder="8", draws=4)
    with pytest.raises(KeyboardInterrupt):
        tune_planted(regime, store=tmp_path, on_event=_interrupt_at(8))
    (path,) = _journals(tmp_path)
    interrupted = path.read_bytes()

    plant(milliseconds=times)  # it works now, and would win
    events = []
    (choice,) = tune_planted(regime, store=tmp_path, on_event=events.append).choices
    assert [event for event in events if isinstance(event, Resumed)] == [Resumed((8,), 1, 2)]
    reported = [(event.tactic, event.known) for event in events if isinstance(event, TacticMeasured)]
    assert reported == [(tactic(name), True) for name in ("default", "fast", "broken")]
    assert choice.tactic == tactic("fast")
    assert choice.rejected == (Rejection(tactic=tactic("broken"), reason="RuntimeError: planted failure"),)
    assert (choice.tried, choice.candidates) == (3, 4)
    assert _journals(tmp_path) == []

    path.write_bytes(interrupted)
    (choice,) = tune_planted(regime, store=tmp_path, again=True).choices
    assert choice.tactic == tactic("broken")
    assert choice.rejected == ()
    assert _journals(tmp_path) == []


def test_an_interrupt_amid_a_batch_leaves_what_failed_in_it(plant, tmp_path, monkeypatch):
    backend = plant(milliseconds={"default": 1.0, "broken": 0.1, "last": 0.1}, raising=frozenset({"broken"}))
    real = PlantedRunner.run

    def run(self, tactic, draw=0):
        if tactic["algorithm"] == "last":
            raise KeyboardInterrupt
        return real(self, tactic, draw)

    monkeypatch.setattr(PlantedRunner, "run", run)
    with pytest.raises(KeyboardInterrupt):
        tune_planted(store=tmp_path)
    journal = Store(tmp_path).journal(LAYER, REGIME, "planted", environment(backend, "cpu"))
    (left,) = journal.read().measurements
    assert (left.rows, left.tactic, left.reason) == (4, tactic("broken"), "RuntimeError: planted failure")


class _Killed(BaseException):
    """Ends a tune as `kill -9` does: nothing of the tune's own handles it."""


def _search_in_three_batches(problem, candidates, warm_starts):
    """Times the warm starts and half of the rest, then the better half, then the best two; the order shows in each."""
    first = tuple(dict.fromkeys((*warm_starts, *candidates.tactics[: len(candidates.tactics) // 2 + len(warm_starts)])))
    times = yield Batch(first)
    for count, rounds in ((3, 4), (2, 4)):
        again = sorted(times, key=times.__getitem__)[:count]
        rest = [each for each in candidates.tactics if each not in times][:1]
        times = {**times, **(yield Batch((*again, *rest), rounds))}
    return tuple(sorted(times, key=times.__getitem__))[:2]


def _decided(profile):
    """Returns what a tune decided. Planted times have some real nanoseconds in them."""
    return [(each.rows, each.tactic, each.default_tactic, each.tried, each.rejected) for each in profile.choices]


@dataclass
class _Writes:
    """Counts the writes of journal and store, and kills the tune at one of them."""

    last: int
    count: int = 0

    def killing(self, real):
        def write(path, content):
            self.count += 1
            if self.count == self.last:
                raise _Killed
            real(path, content)

        return write


@pytest.fixture
def measured(monkeypatch):
    """The batches that are measured, with their buckets."""
    batches, measure = [], BucketTuner._measure

    def noted(self, batch):
        batches.append((self._bucket.rows, batch.rounds, batch.tactics))
        return measure(self, batch)

    monkeypatch.setattr(BucketTuner, "_measure", noted)
    return batches


def test_killed_at_any_write_a_tune_goes_on_and_measures_no_batch_again_but_the_one_in_flight(
    plant, tmp_path, monkeypatch, measured
):
    backend = plant(milliseconds={name: 2.25 - 0.25 * at for at, name in enumerate(("default", *"abcde"))})
    backend.search = _search_in_three_batches
    regime = Regime(ep_size=2, attention_dp=True, ladder="4,8,16", draws=4)
    whole = tune_planted(regime, store=tmp_path / "whole")
    batches = list(measured)
    assert len(set(batches)) == len(batches) == 9
    writes_of_a_bucket = 2 + 3 + 2  # a search begins and ends, three batches, the choice, what is dropped
    for last in range(1, 3 * writes_of_a_bucket + 2):
        measured.clear()
        writes, store = _Writes(last), tmp_path / str(last)
        with monkeypatch.context() as patched:
            for module, name in ((journal_module, "append"), (journal_module, "replace"), (store_module, "replace")):
                patched.setattr(module, name, writes.killing(getattr(module, name)))
            with pytest.raises(_Killed) if last <= 3 * writes_of_a_bucket else nullcontext():
                tune_planted(regime, store=store)
        in_flight = measured[-1:]
        assert _decided(tune_planted(regime, store=store)) == _decided(whole)
        assert list(dict.fromkeys(measured)) == batches
        assert {each for each in measured if measured.count(each) > 1} <= set(in_flight)
        assert len(measured) <= len(batches) + 1
        assert _journals(store) == []


def test_times_of_another_strategy_are_measured_but_what_failed_is_known(plant, tmp_path):
    times = {"default": 4.0, "fast": 1.0, "broken": 0.1}
    plant(milliseconds=times, raising=frozenset({"broken"}))
    regime = Regime(ladder="8", draws=4)
    with pytest.raises(KeyboardInterrupt):
        tune_planted(regime, store=tmp_path, strategy="exhaustive", on_event=_interrupt_at(8))
    events = []
    (choice,) = tune_planted(regime, store=tmp_path, on_event=events.append).choices
    known = {event.tactic: event.known for event in events if isinstance(event, TacticMeasured)}
    assert known == {tactic("default"): False, tactic("fast"): False, tactic("broken"): True}
    assert choice.tactic == tactic("fast")


def test_where_the_default_itself_failed_everything_is_tried_again(plant, tmp_path):
    times = {"default": 4.0, "fast": 0.1}
    plant(milliseconds=times, raising=frozenset(times))
    sizes = []
    for _ in range(3):
        with pytest.raises(NoResultError):
            tune_planted(store=tmp_path)
        (journal,) = _journals(tmp_path)
        sizes.append(journal.stat().st_size)
    assert sizes[1] == sizes[2]
    plant(milliseconds=times)
    events = []
    profile = tune_planted(store=tmp_path, on_event=events.append)
    assert {choice.tactic for choice in profile.choices} == {tactic("fast")}
    assert profile.choices[0].rejected == ()
    assert not [event for event in events if isinstance(event, Resumed)]


def test_a_damaged_line_of_the_journal_is_reported_and_does_not_stop_the_run(plant, tmp_path):
    plant(milliseconds={"default": 1.0})
    with pytest.raises(KeyboardInterrupt):
        tune_planted(store=tmp_path, on_event=_interrupt_at(4))
    (path,) = _journals(tmp_path)
    path.write_bytes(b"damage\n" + path.read_bytes())
    events = []
    assert len(tune_planted(store=tmp_path, on_event=events.append).choices) == 2
    (resumed,) = (event for event in events if isinstance(event, Resumed))
    assert resumed.rows == (4,)
    assert [reason.startswith(f"{path}, line 1, is no measurement") for reason in resumed.unread] == [True]


def test_an_interrupt_between_two_buckets_ends_the_worker_at_once():
    """Also while somebody holds the traceback, and with it the generator."""
    strangers = children()

    def interrupt(event):
        if isinstance(event, BucketChosen):
            assert children() > strangers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        tune(LAYER, REGIME, PlantedBackend({"default": 0.1}), device="cpu", on_event=interrupt)
    assert raised.tb
    assert children() == strangers


@pytest.fixture
def one_thread(monkeypatch):
    """Of torch, here and in processes that are started: two on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ctrl_c_leaves_the_finished_buckets_and_what_the_next_one_had_measured(one_thread, tmp_path):
    """The command line, really killed; the library goes on."""
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 128,'
        ' "moe_intermediate_size": 128, "hidden_act": "silu", "norm_topk_prob": true, "torch_dtype": "float32"}'
    )
    store = tmp_path / "store"
    words = ["--model", config, "--ladder", "1,128", "--draws", "1", "--backend", "torch", "--store", store]
    # on a busy machine the first bucket would be too noisy to be saved at once
    program = "import moetune.tuning.run as run; run.NOISY = float('inf'); from moetune.cli.main import main; main()"
    timed = re.compile(r'"rows":128,.*"time_us":[0-9]')
    with subprocess.Popen([sys.executable, "-c", program, "tune", *words], stderr=subprocess.PIPE, text=True) as run:
        try:
            assert eventually(lambda: any(timed.search(path.read_text()) for path in _journals(store)))
            run.send_signal(signal.SIGINT)
            _, said = run.communicate(timeout=GIVE_UP_S)
        finally:
            run.kill()
    assert run.returncode == 130
    assert "Finished buckets are saved: 1. Run the same command again" in said
    assert said.endswith("\nerror: interrupted.\n")

    ((_, profile),) = Store(store).profiles()
    journal = Store(store).journal(profile.layer, profile.regime, "torch", profile.environment)
    measured = [measurement for measurement in journal.read().measurements if measurement.rows == 128]
    assert [choice.rows for choice in profile.choices] == [1]
    assert tactic("eager") in {measurement.tactic for measurement in measured if measurement.time_us}

    events = []
    whole = tune(profile.layer, profile.regime, "torch", store, device="cpu", isolate=False, on_event=events.append)
    assert whole.choices[:-1] == profile.choices
    assert [choice.rows for choice in whole.choices] == [1, 128]
    assert [event.rows for event in events if isinstance(event, Resumed | BucketStarted)] == [(128,), 128]
    assert _journals(store) == []
