"""A save is finished before Ctrl-C ends a tune."""

import os
import signal
import threading
import time

import pytest
from runs import tune_planted

from moetune.store.store import Store
from moetune.tuning import bucket_tuner
from moetune.tuning import uninterrupted as module
from moetune.tuning.uninterrupted import uninterrupted


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def run_in_block(*steps):
    """Runs steps without an interrupt. Returns how many were done, and the interrupt that came at the end."""
    done = 0
    try:
        with uninterrupted():
            for step in steps:
                step()
                done += 1
    except KeyboardInterrupt as error:
        return done, error
    return done, None


def fail():
    raise ValueError("full")


def test_a_signal_is_deferred_to_the_end_of_the_block(monkeypatch):
    monkeypatch.setattr(module, "SAME_S", 60.0)
    done, error = run_in_block(interrupt, interrupt)  # two at once are one request
    assert done == 2
    assert error is not None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run_in_block() == (0, None)


def test_a_second_signal_is_not_deferred(monkeypatch):
    monkeypatch.setattr(module, "SAME_S", 0.0)
    done, error = run_in_block(interrupt, lambda: time.sleep(0.001), interrupt, fail)
    assert done == 2
    assert error.__context__ is None


def test_an_error_in_the_block_is_the_context_of_the_interrupt():
    _, error = run_in_block(interrupt, fail)
    assert str(error.__context__) == "full"


def test_another_thread_defers_nothing():
    seen = []

    def run():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_handler_that_is_not_python_s_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_in_a_save_keeps_the_finished_bucket(plant, monkeypatch, tmp_path, moment):
    plant(milliseconds={"default": 2.0, "fast": 1.0})
    real = Store.save

    def save(self, profile, **options):
        if moment == "before":
            interrupt()
        saved = real(self, profile, **options)
        if moment == "after":
            interrupt()
        return saved

    monkeypatch.setattr(Store, "save", save)
    with pytest.raises(KeyboardInterrupt):
        tune_planted(store=tmp_path)
    ((_, profile),) = Store(tmp_path).profiles()
    assert [(choice.rows, choice.tactic["algorithm"]) for choice in profile.choices] == [(4, "fast")]


def test_ctrl_c_after_a_final_comparison_keeps_the_finished_bucket(plant, monkeypatch, tmp_path):
    plant(milliseconds={"default": 2.0, "fast": 1.0})
    real = bucket_tuner.decide

    def decide(*arguments):
        interrupt()
        return real(*arguments)

    monkeypatch.setattr(bucket_tuner, "decide", decide)
    with pytest.raises(KeyboardInterrupt):
        tune_planted(store=tmp_path)
    ((_, profile),) = Store(tmp_path).profiles()
    assert [choice.rows for choice in profile.choices] == [4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_tune_leaves_the_handlers_as_they_were(plant, tmp_path):
    plant(milliseconds={"default": 2.0, "fast": 1.0})
    handlers = [signal.getsignal(number) for number in module.ENDING]
    tune_planted(store=tmp_path)
    assert [signal.getsignal(number) for number in module.ENDING] == handlers
