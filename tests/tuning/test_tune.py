import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import LAYER, PlantedBackend, PlantedRunner, tactic
from processes import children, eventually

from moetune.backends import registry
from moetune.backends.base import Problem
from moetune.errors import MissError, NoResultError, UsageError
from moetune.measure.bench import Bench
from moetune.measure.compiling import Compilers
from moetune.measure.probe import environment
from moetune.search.base import Batch
from moetune.spec.enums import DISTRIBUTION_VARIABLE
from moetune.spec.regime import Regime
from moetune.stats import paired_ratio
from moetune.store.profile import Rejection
from moetune.store.store import Store
from moetune.tuning import final_comparison as final_module
from moetune.tuning.bucket import FINAL_SHARE, Bucket, num_unseen, untouched_draws
from moetune.tuning.events import (
    BucketChosen,
    BucketsSkipped,
    BucketStarted,
    Resumed,
    SearchStopped,
    Served,
    TacticMeasured,
)
from moetune.tuning.final_comparison import OPENING, SAMPLES, Final, _num_rounds, play
from moetune.tuning.tune import load, tune
from moetune.tuning.verdict import choice as choice_of
from moetune.tuning.verdict import decide
from moetune.workload.routing import realize

REGIME = Regime(ep_size=2, attention_dp=True, ladder="4,8", draws=4)


@pytest.fixture
def plant(monkeypatch):
    def _plant(**planted):
        backend = PlantedBackend(**planted)
        real = registry.backend
        monkeypatch.setattr(registry, "backend", lambda name: backend if name == "planted" else real(name))
        return backend

    return _plant


def _tune(regime=REGIME, **options):
    return tune(LAYER, regime, "planted", device="cpu", **{"isolate": False, **options})


def test_the_fastest_right_tactic_replaces_the_default_in_every_bucket(plant):
    plant(milliseconds={"default": 6.0, "fast": 0.2, "middling": 3.0})
    profile = _tune()
    assert [choice.rows for choice in profile.choices] == [4, 8]
    for choice in profile.choices:
        assert choice.tactic == tactic("fast")
        assert choice.default_tactic == tactic("default")
        assert 1.0 < choice.gain_low <= choice.gain <= choice.gain_high
        assert set(choice.stress_us) == {"2", "3", "4"} == set(choice.default_stress_us)
        assert choice.tried == 3
        assert choice.candidates == 4
    assert profile.tactic(5) == tactic("fast")


def test_a_tie_keeps_the_default(plant):
    plant(milliseconds={"default": 1.0, "other": 1.0, "slower": 1.2})
    assert {choice.tactic for choice in _tune().choices} == {tactic("default")}


def test_a_tactic_that_raises_or_is_wrong_costs_only_itself(plant):
    plant(
        milliseconds={"default": 4.0, "fast": 0.2, "broken": 0.1, "liar": 0.1},
        raising=frozenset({"broken"}),
        wrong=frozenset({"liar"}),
    )
    events = []
    profile = _tune(on_event=events.append)
    reasons = {rejection.tactic["algorithm"]: rejection.reason for rejection in profile.choices[0].rejected}
    assert profile.choices[0].tactic == tactic("fast")
    assert reasons["broken"] == "RuntimeError: planted failure"
    assert "relative error" in reasons["liar"]
    assert "huge" not in reasons  # it was not tried; `plan` says why
    measured = {e.tactic["algorithm"]: e for e in events if isinstance(e, TacticMeasured) and e.rows == 4}
    assert measured.keys() == {"default", "fast", "broken", "liar"}
    assert measured["broken"].time_us is None
    assert measured["broken"].reason


def test_a_tactic_with_a_cliff_cannot_win(plant):
    plant(milliseconds={"default": 6.0, "trap": 1.0, "steady": 2.5}, cliff=frozenset({"trap"}))
    choice = _tune().choices[0]
    assert choice.tactic == tactic("steady")
    assert any(r.tactic == tactic("trap") and r.reason.startswith("cliff") for r in choice.rejected)


def test_without_a_working_default_there_is_no_result(plant):
    plant(milliseconds={"default": 1.0, "fast": 0.5}, raising=frozenset({"default"}))
    with pytest.raises(NoResultError, match="planted failure"):
        _tune()


def test_where_draws_alternate_between_two_row_counts_a_search_has_its_rounds_of_each(plant, monkeypatch):
    plant(milliseconds={"default": 0.2, "fast": 0.1})
    searched, finals = {}, {}
    real_samples, real_play = Bench.samples, final_module.play

    def samples(bench, tactics, draws):
        searched.setdefault(bench.problem.rows, [draw % 2 for draw in draws])
        return real_samples(bench, tactics, draws)

    def played(*args, alternate, **options):
        finals[max(searched)] = alternate
        return real_play(*args, alternate=alternate, **options)

    prepared = Bench.__init__
    monkeypatch.setattr(
        Bench, "__init__", lambda self, backend, p, *a: (setattr(self, "problem", p), prepared(self, backend, p, *a))[0]
    )
    monkeypatch.setattr(Bench, "samples", samples)
    monkeypatch.setattr(final_module, "play", played)
    profile = _tune(Regime(ep_size=2, layout="deduplicated", tune_max_num_tokens=8, draws=4))
    assert [(choice.rows, choice.met_rows) for choice in profile.choices] == [(1, None), (2, None), (4, 6), (8, None)]
    assert finals == {1: False, 2: False, 6: True, 8: False}
    assert len(searched[6]) == 2 * len(searched[2])
    assert sum(searched[6]) == len(searched[2])


def test_the_second_run_is_served_without_measuring(plant):
    backend = plant(milliseconds={"default": 1.0, "fast": 0.3})
    first = _tune()
    backend.prepared.clear()
    events = []
    assert _tune(on_event=events.append) == first
    assert [type(event) for event in events] == [Served]
    assert backend.prepared == []
    assert load(LAYER, REGIME, "planted", device="cpu") == first


def test_again_measures_anew(plant):
    backend = plant(milliseconds={"default": 1.0})
    _tune()
    backend.prepared.clear()
    _tune(again=True)
    assert backend.prepared == [4, 8]


def test_an_interrupted_run_resumes_at_the_next_bucket(plant):
    backend = plant(milliseconds={"default": 1.0})

    def interrupt(event):
        if isinstance(event, BucketChosen):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune(on_event=interrupt)
    assert backend.prepared == [4]
    with pytest.raises(MissError, match="buckets 8"):
        _tune(frozen=True)
    events = []
    assert len(_tune(on_event=events.append).choices) == 2
    assert backend.prepared == [4, 8]
    assert [event.rows for event in events if isinstance(event, BucketStarted)] == [8]


def _interrupt_at(rows):
    """Interrupts once something of the search of that bucket is known."""

    def interrupt(event):
        if isinstance(event, TacticMeasured) and event.rows == rows:
            raise KeyboardInterrupt

    return interrupt


def _journals(root):
    return list(root.glob("*/*/*/*.journal.jsonl"))


def test_what_failed_before_an_interrupt_is_not_run_again_and_keeps_its_reason(plant, tmp_path):
    times = {"default": 4.0, "fast": 1.0, "broken": 0.1}
    plant(milliseconds=times, raising=frozenset({"broken"}))
    regime = Regime(ladder="8", draws=4)
    with pytest.raises(KeyboardInterrupt):
        _tune(regime, store=tmp_path, on_event=_interrupt_at(8))
    (path,) = _journals(tmp_path)
    interrupted = path.read_bytes()

    plant(milliseconds=times)  # it works now, and would win
    events = []
    (choice,) = _tune(regime, store=tmp_path, on_event=events.append).choices
    assert [event for event in events if isinstance(event, Resumed)] == [Resumed((8,), 1)]
    measured = [event.tactic for event in events if isinstance(event, TacticMeasured)]
    assert measured == [tactic("default"), tactic("fast")]
    assert choice.tactic == tactic("fast")
    assert choice.rejected == (Rejection(tactic=tactic("broken"), reason="RuntimeError: planted failure"),)
    assert (choice.tried, choice.candidates) == (2, 4)
    assert _journals(tmp_path) == []

    path.write_bytes(interrupted)
    (choice,) = _tune(regime, store=tmp_path, again=True).choices
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
        _tune(store=tmp_path)
    journal = Store(tmp_path).journal(LAYER, REGIME, "planted", environment(backend, "cpu"))
    (left,) = journal.read().measurements
    assert (left.rows, left.tactic, left.reason) == (4, tactic("broken"), "RuntimeError: planted failure")


def test_what_an_interrupted_search_found_best_starts_the_next_one_where_searches_are_warm_started(plant):
    backend = plant(milliseconds={"default": 8.0, "slow": 4.0, "fast": 0.1})
    told = []

    def search(problem, candidates, starts):
        told.append((problem.rows, tuple(starts)))
        times = yield Batch(tuple(map(tactic, ("default", "slow") if problem.rows == 4 else ("slow", "fast"))))
        return tuple(sorted(times, key=times.__getitem__))

    backend.search = search
    for rows in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            _tune(on_event=_interrupt_at(rows))
    assert told[-1] == (8, (tactic("slow"), tactic("default")))
    assert {starts for rows, starts in told if rows == 4} == {()}
    _tune()
    assert told[-1] == (8, (tactic("fast"), tactic("slow")))


def test_where_the_default_itself_failed_everything_is_tried_again(plant):
    times = {"default": 4.0, "fast": 0.1}
    plant(milliseconds=times, raising=frozenset(times))
    with pytest.raises(NoResultError):
        _tune()
    plant(milliseconds=times)
    events = []
    profile = _tune(on_event=events.append)
    assert {choice.tactic for choice in profile.choices} == {tactic("fast")}
    assert profile.choices[0].rejected == ()
    assert not [event for event in events if isinstance(event, Resumed)]


def test_a_damaged_line_of_the_journal_is_told_and_does_not_stop_the_run(plant, tmp_path):
    plant(milliseconds={"default": 1.0})
    with pytest.raises(KeyboardInterrupt):
        _tune(store=tmp_path, on_event=_interrupt_at(4))
    (path,) = _journals(tmp_path)
    path.write_bytes(b"damage\n" + path.read_bytes())
    events = []
    assert len(_tune(store=tmp_path, on_event=events.append).choices) == 2
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
    with subprocess.Popen([sys.executable, "-m", "moetune", "tune", *words], stderr=subprocess.PIPE, text=True) as run:
        try:
            assert eventually(lambda: any('"rows":128' in path.read_text() for path in _journals(store)), 60)
            run.send_signal(signal.SIGINT)
            _, said = run.communicate(timeout=30)
        finally:
            run.kill()
    assert run.returncode == 130
    assert "Finished buckets are saved: 1. The same command goes on from there.\n" in said
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


def test_a_packaged_profile_of_some_buckets_is_the_base_of_the_answer(plant, tmp_path):
    backend = plant(milliseconds={"default": 1.0})
    packaged = tmp_path / "packaged"

    def interrupt(event):
        if isinstance(event, BucketChosen):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune(store=packaged, on_event=interrupt)
    (path,) = packaged.glob("*/*/*/*.json")
    before = path.read_bytes()
    backend.prepared.clear()

    store = Store(tmp_path / "store", packaged)
    with pytest.raises(MissError, match="buckets 8"):
        _tune(store=store, frozen=True)
    profile = _tune(store=store)
    assert backend.prepared == [8]
    assert [choice.rows for choice in profile.choices] == [4, 8]
    assert Store(tmp_path / "store").find(LAYER, REGIME, "planted", profile.environment)[1] == profile
    assert path.read_bytes() == before
    events = []
    _tune(store=store, on_event=events.append)
    assert [(type(event), event.packaged) for event in events] == [(Served, False)]


def test_a_whole_packaged_profile_is_served_even_where_the_store_cannot_be_written(plant, tmp_path):
    backend = plant(milliseconds={"default": 1.0})
    profile = _tune(store=tmp_path / "packaged")
    backend.prepared.clear()
    (tmp_path / "file").write_text("in the way")
    events = []
    store = Store(tmp_path / "file", tmp_path / "packaged")
    assert _tune(store=store, on_event=events.append) == profile
    (served,) = events
    assert served.packaged
    assert served.path.is_relative_to(tmp_path / "packaged")
    assert backend.prepared == []


def test_a_backend_made_with_options_is_taken_as_it_is(plant):
    named = plant(milliseconds={"default": 1.0, "fast": 0.3})
    made = PlantedBackend(milliseconds={"default": 1.0})
    profile = tune(LAYER, REGIME, made, device="cpu", isolate=False)
    assert made.prepared == [4, 8]
    assert named.prepared == []
    assert load(LAYER, REGIME, made, device="cpu") == profile


def test_frozen_and_again_exclude_each_other(plant):
    plant(milliseconds={"default": 1.0})
    _tune()
    with pytest.raises(UsageError, match="--frozen never measures"):
        _tune(frozen=True, again=True)


@pytest.mark.parametrize("raising", [(), ("default",)])
def test_a_default_that_was_not_compiled_ahead_is_still_run(plant, monkeypatch, raising):
    """The process that compiled it may have been killed for memory."""
    uncompiled = {tactic("default"): "killed by SIGKILL", tactic("other"): "killed by SIGKILL"}
    monkeypatch.setattr(Compilers, "wait", lambda self, *question: dict(uncompiled))
    plant(milliseconds={"default": 1.0, "other": 0.1, "fast": 0.3}, raising=frozenset(raising))
    if raising:
        with pytest.raises(NoResultError, match="planted failure"):
            _tune()
        return
    choice = _tune().choices[0]
    assert choice.tactic == tactic("fast")
    assert choice.rejected == (Rejection(tactic=tactic("other"), reason="killed by SIGKILL"),)


def test_what_a_search_would_propose_next_is_compiled_meanwhile(plant, monkeypatch):
    def search(self, problem, candidates, starts):
        yield Batch((tactic("default"), tactic("fast")), likely_next=(tactic("slow"),))
        return tuple((yield Batch((tactic("default"),))))

    waited = []
    monkeypatch.setattr(Compilers, "wait", lambda self, *question: waited.append(question[3:]) or {})
    monkeypatch.setattr(PlantedBackend, "search", search, raising=False)
    plant(milliseconds={"default": 1.0, "fast": 0.1, "slow": 2.0})
    _tune(Regime(ladder="4"))
    assert waited == [((tactic("default"), tactic("fast")), (tactic("slow"),)), ((tactic("default"),), ())]


def test_frozen_never_measures_and_names_what_differs(plant):
    backend = plant(milliseconds={"default": 1.0})
    _tune()
    backend.prepared.clear()
    other = Regime(ep_size=2, attention_dp=False, ladder="4,8", draws=4)
    with pytest.raises(MissError) as miss:
        _tune(other, frozen=True)
    assert "attention_dp" in {difference.field for difference in miss.value.differences}
    assert "attention_dp" in str(miss.value)
    assert backend.prepared == []


def test_the_environment_gives_the_distribution_unless_one_was_given(plant, monkeypatch):
    plant(milliseconds={"default": 0.1})
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "BALANCED")
    assert _tune(Regime(ladder="2")).regime.distribution == "balanced"
    assert _tune(Regime(ladder="2", distribution="random")).regime.distribution == "random"
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "foo")
    with pytest.raises(UsageError, match="balanced, random"):
        _tune(Regime(ladder="2"))


def test_the_load_is_stored_with_the_choice(plant):
    plant(milliseconds={"default": 0.1})
    choice = _tune().choices[0]
    assert sum(choice.load) == 4 * LAYER.top_k * REGIME.draws
    assert len(choice.load) == LAYER.num_experts // REGIME.ep_size
    assert max(choice.load) / REGIME.draws <= choice.max_load <= 4


def test_a_tactic_that_is_slower_in_most_rounds_does_not_win_by_the_default_s_hiccups(plant):
    backend = plant(milliseconds={"default": 1.0, "slower": 1.5})
    final = Final(
        tactic("default"),
        default_us=(10.0, 10.0, 10.0, 200.0) * 10,
        noise=0.0,
        finalists={tactic("slower"): (15.0, 15.0, 15.0, 15.0) * 10},
        draws=tuple(range(40)),
    )
    regime = Regime(draws=1)
    routing = realize(LAYER, regime, 4)
    problem = Problem(LAYER, regime, 4, regime.shard(LAYER), (routing,) * 5, "cpu")
    assert decide(final, Bench(backend, problem), {"2": 0}).tactic == tactic("default")


class _Scripted:
    """A bench on which the default takes 10 µs and others 9, in disturbed rounds `slow(round)` times that.

    Of who is timed twice the first time is never disturbed. `fails`: who, and from which round on.
    """

    def __init__(self, slow, fails=(None, 0)):
        self.failures, self.rounds, self._slow, self._fails = {}, 0, slow, fails

    def samples(self, tactics, draws):
        start, self.rounds = self.rounds, self.rounds + len(draws)
        who, since = self._fails
        if who in tactics and self.rounds > since:
            self.failures[who] = "planted failure"
        slow = [self._slow(number) for number in range(start, self.rounds)]
        series = [[(10.0 if played == tactic("default") else 9.0) * factor for factor in slow] for played in tactics]
        if len(tactics) > 1:
            series[0] = [9.0 if tactics[0] != tactic("default") else 10.0] * len(draws)
        return [None if played in self.failures else of for played, of in zip(tactics, series, strict=True)]


def test_rounds_in_which_the_default_disagrees_with_itself_are_dropped_for_all_alike():
    bench = _Scripted(lambda number: 5.0 if number % 3 == 0 else 1.0)
    final = play(bench, tactic("default"), [tactic("other")], [0, 1])
    assert set(final.finalists[tactic("other")]) == {9.0}
    assert set(final.default_us) == {10.0}
    assert len(final.default_us) == len(final.finalists[tactic("other")]) >= 20
    assert final.noise == 0


def test_where_nearly_every_round_is_disturbed_all_count_and_the_noise_says_so():
    bench = _Scripted(lambda number: 1.0 if number % 100 == 0 else 5.0)
    final = play(bench, tactic("default"), [tactic("other")], [0, 1])
    assert len(final.draws) == len(final.default_us) == bench.rounds > 2 * SAMPLES[1]
    assert final.noise > 1


def test_a_finalist_that_fails_when_the_final_is_prolonged_costs_only_itself():
    bench = _Scripted(lambda number: 5.0 if 6 < number < 120 else 1.0, fails=(tactic("other"), 100))
    final = play(bench, tactic("default"), [tactic("steady"), tactic("other")], [0, 1])
    assert bench.rounds > 120
    assert final.finalists.keys() == {tactic("steady")}
    assert len(final.finalists[tactic("steady")]) == len(final.default_us)


def _decided(default_us, other_us, stressed, failures):
    """The verdict on the default and `other`, their rounds all alike; `stressed` is what the bench answers."""
    final = Final(tactic("default"), (default_us,) * 20, 0.0, {tactic("other"): (other_us,) * 20}, tuple(range(20)))
    bench = _Scripted(lambda number: 1.0)
    bench.failures = failures
    answers = dict(zip((tactic("default"), tactic("other")), stressed, strict=True))
    bench.samples = lambda tactics, draws: [answers[one] and answers[one] * len(draws) for one in tactics]
    return decide(final, bench, {"2": 1})


def test_the_winner_is_the_least_behind_at_the_row_count_where_it_is_furthest_behind():
    """Of three finalists one is best at each row count and far behind at the other."""
    draws = tuple(range(20))
    one, other, both = tactic("one"), tactic("other"), tactic("both")
    finalists = {
        one: tuple(8.0 if draw % 2 else 4.0 for draw in draws),
        other: tuple(5.0 if draw % 2 else 7.0 for draw in draws),
        both: tuple(6.5 if draw % 2 else 6.0 for draw in draws),
    }
    final = Final(tactic("default"), (10.0,) * 20, 0.0, finalists, draws)
    bench = _Scripted(lambda number: 1.0)
    bench.samples = lambda tactics, draws: [(1.0,) * len(draws) for _ in tactics]
    assert decide(final, bench, {"2": 1}).tactic in (one, other)  # by the mean of all rounds
    assert decide(replace(final, alternate=True), bench, {"2": 1}).tactic == both


def test_a_buckets_own_rows_count_half_where_others_are_met():
    """Even draws have the bucket's own rows; `own` is 30 % behind on the others, `met` 40 % on these."""
    draws = tuple(range(20))
    own, met = tactic("own"), tactic("met")
    finalists = {own: (5.0, 6.5) * 10, met: (7.0, 5.0) * 10}
    final = Final(tactic("default"), (10.0,) * 20, 0.0, finalists, draws)
    bench = _Scripted(lambda number: 1.0)
    bench.samples = lambda tactics, draws: [(1.0,) * len(draws) for _ in tactics]
    assert decide(final, bench, {"2": 1}).tactic == own
    assert decide(replace(final, alternate=True), bench, {"2": 1}).tactic == met
    swapped = replace(final, draws=tuple(draw + 1 for draw in draws), alternate=True)
    assert decide(swapped, bench, {"2": 1}).tactic == own


def test_who_left_after_the_opening_never_wins_over_one_that_stayed():
    draws = tuple(range(20))
    finalists = {tactic("left"): (1.0,) * 6, tactic("stayed"): (2.0,) * 20}
    final = Final(tactic("default"), (10.0,) * 20, 0.0, finalists, draws)
    bench = _Scripted(lambda number: 1.0)
    bench.samples = lambda tactics, draws: [(1.0,) * len(draws) for _ in tactics]
    assert decide(replace(final, alternate=True), bench, {"2": 1}).tactic == tactic("stayed")


DEFAULT, GOOD, NEXT, POOR = map(tactic, ("default", "good", "next", "poor"))


class _Uneven:
    """Tactics by their µs on even and on odd draws, besides that uneven by `spread`, each in its own way.

    Counts the rounds of each. `fails`: who, and in which call.
    """

    eager: dict[int, str]

    def __init__(self, us, spread=0.0, fails=(None, 0)):
        self.us, self.spread, self.failures, self.rounds, self.calls = us, spread, {}, Counter(), 0
        self._fails = fails

    def samples(self, tactics, draws):
        self.calls += 1
        if self._fails[0] in tactics and self.calls == self._fails[1]:
            self.failures[self._fails[0]] = "planted"
        for played in dict.fromkeys(tactics):
            self.rounds[played] += len(draws)
        return [None if t in self.failures else tuple(self.once_us(t, draw) for draw in draws) for t in tactics]

    def once_us(self, played, draw):
        return self.us[played][draw % 2] * random.Random(f"{played} {draw}").gauss(1, self.spread)


UNSEEN = range(16, 80)
TO_THE_END = (*UNSEEN, *UNSEEN)[: SAMPLES[1]]
TIED = {GOOD: (9.0, 10.0), NEXT: (10.0, 9.0)}


def test_a_final_that_is_not_settled_plays_the_most_rounds_each_draw_as_often():
    bench = _Uneven({DEFAULT: (10.0, 10.0), **TIED})
    final = play(bench, DEFAULT, [GOOD, NEXT], UNSEEN, seconds=1e-6)
    assert final.draws == TO_THE_END
    for tied in TIED:
        assert final.finalists[tied] == tuple(bench.once_us(tied, draw) for draw in final.draws)


def test_who_cannot_be_the_fastest_does_not_go_on():
    bench = _Uneven({DEFAULT: (11.0, 11.0), POOR: (10.2, 10.2), **TIED})
    final = play(bench, DEFAULT, [GOOD, NEXT, POOR], UNSEEN, seconds=1e-6)
    assert len(final.default_us) == len(final.finalists[POOR]) == SAMPLES[0]
    assert bench.rounds[POOR] == SAMPLES[0]
    assert len(final.finalists[GOOD]) == len(final.finalists[NEXT]) == SAMPLES[1]
    assert decide(final, bench, {"2": 0}).tactic in TIED


@pytest.mark.parametrize("good_us", [9.0, 10.0, 10.03], ids=["ahead", "tied", "not worth it"])
def test_a_settled_final_ends(good_us):
    bench = _Uneven({DEFAULT: (10.0, 10.0), GOOD: (good_us, good_us)}, spread=1e-3)
    final = play(bench, DEFAULT, [GOOD], UNSEEN, seconds=1e-6)
    assert len(final.draws) == SAMPLES[0]


def test_a_final_of_two_row_counts_plays_to_the_end_with_everyone():
    """`POOR` is behind at one of them, and by the mean of all rounds; the winner may nonetheless be such a one."""
    us = {DEFAULT: (11.0, 11.0), GOOD: (9.0, 9.0), POOR: (10.5, 8.9)}
    final = play(_Uneven(us), DEFAULT, [GOOD, POOR], UNSEEN, seconds=1e-6, alternate=True)
    assert final.alternate
    assert final.draws == TO_THE_END
    assert {len(series) for series in (final.default_us, *final.finalists.values())} == {len(TO_THE_END)}
    apart = play(_Uneven(us), DEFAULT, [GOOD, POOR], UNSEEN, seconds=1e-6)
    assert len(apart.finalists[POOR]) == SAMPLES[0]


def test_a_default_that_is_far_behind_does_not_go_on_either():
    final = play(_Uneven({DEFAULT: (50.0, 50.0), **TIED}), DEFAULT, [GOOD, NEXT], UNSEEN, seconds=1e-6)
    assert len(final.default_us) == OPENING
    assert final.draws == TO_THE_END


@pytest.mark.parametrize("default_us", [50.0, 10.4, 8.0])
def test_a_choice_s_times_are_the_means_of_what_counts_and_differ_by_the_gain(default_us):
    bench = _Uneven({DEFAULT: (default_us, default_us), **TIED}, spread=0.05)
    bench.eager = {}
    final = play(bench, DEFAULT, [GOOD, NEXT], UNSEEN, seconds=1e-6)
    verdict = decide(final, bench, {"2": 0})
    record = choice_of(final, verdict, bench, [realize(LAYER, REGIME, 4)], rows=4, tried=3, candidates=3)
    everyone = {DEFAULT: final.default_us, **final.finalists}
    assert record.tactic == (DEFAULT if default_us == 8.0 else verdict.tactic)
    assert record.time_us == pytest.approx(fmean(everyone[record.tactic][OPENING if default_us == 50.0 else 0 :]))
    assert record.default_time_us / record.time_us == pytest.approx(record.gain)
    if default_us == 50.0:
        assert record.gain == pytest.approx(fmean(final.default_us) / fmean(everyone[record.tactic][:OPENING]))


class _Unsteady(_Uneven):
    """In the opening `GOOD` takes 8 % less."""

    def samples(self, tactics, draws):
        taken, factor = super().samples(tactics, draws), 0.92 if self.calls < 3 else 1.0
        return [
            tuple(factor * us for us in series) if played == GOOD else series
            for played, series in zip(tactics, taken, strict=True)
        ]


@pytest.mark.parametrize(("default_us", "best"), [(50.0, NEXT), (10.4, GOOD)])
def test_what_the_opening_says_of_who_goes_on_counts_only_where_the_default_does(default_us, best):
    bench = _Unsteady({DEFAULT: (default_us, default_us), GOOD: (9.9, 9.9), NEXT: (9.8, 9.8)}, spread=1e-3)
    final = play(bench, DEFAULT, [NEXT, GOOD], UNSEEN, most_s=0.0)
    assert final.opening == (OPENING if default_us == 50.0 else 0)
    assert len(final.finalists[GOOD]) == len(final.finalists[NEXT]) == SAMPLES[0]
    assert sum(final.finalists[GOOD]) < sum(final.finalists[NEXT])
    assert decide(final, bench, {"2": 0}).tactic == best


@pytest.mark.parametrize(("default_us", "call"), [(9.5, 2), (9.5, 3), (50.0, 3), (50.0, 4)])
@pytest.mark.parametrize("failing", TIED)
def test_who_fails_while_a_final_is_prolonged_costs_only_itself(default_us, call, failing):
    bench = _Uneven({DEFAULT: (default_us, default_us), **TIED}, fails=(failing, call))
    final = play(bench, DEFAULT, [GOOD, NEXT], UNSEEN, seconds=1e-6)
    assert bench.failures.keys() == {failing}
    assert final.finalists.keys() == TIED.keys() - {failing}
    assert all(len(series) == len(final.draws) for series in final.finalists.values())
    assert decide(final, bench, {"2": 0}).tactic != failing


def test_a_default_that_fails_while_a_final_is_prolonged_leaves_no_result():
    bench = _Uneven({DEFAULT: (9.0, 10.0), GOOD: (10.0, 9.0)}, fails=(DEFAULT, 3))
    with pytest.raises(NoResultError, match="planted"):
        play(bench, DEFAULT, [GOOD], UNSEEN, seconds=1e-6)


@given(st.lists(st.floats(8, 12), min_size=2, max_size=7), st.floats(0, 0.1), st.floats(0, 0.01))
@settings(max_examples=50, deadline=None)
def test_whoever_wins_is_by_what_was_measured_at_most_as_far_behind_as_is_settled(us, spread, seconds):
    players = [tactic(f"number {number}") for number in range(len(us))]
    bench = _Uneven({player: (of_player, of_player) for player, of_player in zip(players, us, strict=True)}, spread)
    final = play(bench, players[0], players[1:], UNSEEN, seconds)
    everyone = {final.default: final.default_us, **final.finalists}
    assert SAMPLES[0] <= len(final.draws) <= SAMPLES[1]
    assert all(
        series == tuple(bench.once_us(t, d) for d in final.draws[: len(series)]) for t, series in everyone.items()
    )
    stayed = [series for series in everyone.values() if len(series) == len(final.draws)]
    leader = min(stayed, key=sum)
    if len(final.draws) < SAMPLES[1]:
        assert all(paired_ratio(series, leader).low >= 1 - final_module.SETTLED for series in stayed)
    for series in everyone.values():
        if len(series) < len(final.draws):
            assert min(sum(other[: len(series)]) for other in stayed) < sum(series)


def test_a_few_disturbed_rounds_do_not_prolong_a_final():
    bench = _Scripted(lambda number: 5.0 if number % 10 == 0 else 1.0)
    final = play(bench, DEFAULT, [GOOD], UNSEEN, seconds=3e-3)
    assert SAMPLES[1] <= bench.rounds <= SAMPLES[1] + OPENING
    assert set(final.default_us) == {10.0}
    assert len(final.draws) == len(final.default_us) < SAMPLES[1]


@pytest.mark.parametrize(("round_us", "budget_us", "rounds"), [(10.0, 0.0, 20), (10.0, 1e6, 96), (2e4, 1e6, 50)])
def test_a_final_has_as_many_rounds_as_its_time_allows(round_us, budget_us, rounds):
    assert _num_rounds(round_us, budget_us, 20) == rounds


@pytest.mark.parametrize(("most_s", "rounds"), [(None, SAMPLES[1]), (2.1e-3, 70), (0.0, SAMPLES[0])])
@pytest.mark.parametrize("default_us", [10.0, 50.0])
def test_a_final_is_prolonged_for_so_long_at_most(most_s, rounds, default_us):
    """A round takes 30 µs: two that are tied, and one of them again; or the default with them, which is as fast."""
    bench = _Uneven({DEFAULT: (default_us, default_us), GOOD: (9.0, 11.0), NEXT: (11.0, 9.0)})
    in_a_round = 3 if default_us == 50.0 else 4
    final = play(bench, DEFAULT, [GOOD, NEXT], UNSEEN, 1e-6, most_s=most_s and most_s * in_a_round / 3)
    assert len(final.draws) == rounds


def test_a_final_has_no_more_time_before_it_is_prolonged_than_in_all():
    bench = _Uneven({DEFAULT: (50.0, 50.0), **TIED})
    assert len(play(bench, DEFAULT, [GOOD, NEXT], UNSEEN, seconds=1.0, most_s=0.0).draws) == SAMPLES[0]


def test_a_final_of_two_row_counts_has_the_least_rounds_of_each():
    us = {DEFAULT: (11.0, 11.0), GOOD: (9.0, 9.0)}
    final = play(_Uneven(us), DEFAULT, [GOOD], UNSEEN, most_s=0.0, alternate=True)
    assert Counter(draw % 2 for draw in final.draws) == {0: SAMPLES[0], 1: SAMPLES[0]}


@pytest.mark.parametrize(
    ("rows", "num_local", "draws"),
    [
        (4, 32, 64),
        (128, 32, 32),
        (512, 32, 16),
        (8192, 32, 16),
        (512, 16, 32),
        (512, 4, 64),
        (2048, 4, 32),
        (8192, 4, 16),
    ],
)
def test_the_fewer_rows_or_experts_the_more_draws_has_a_final(rows, num_local, draws):
    assert num_unseen(16, rows, num_local) == draws
    assert num_unseen(1, rows, num_local) in (1, 2, 4)
    assert untouched_draws(16).start >= 16 + num_unseen(16, rows, num_local)
    assert len(untouched_draws(16)) == 16


def test_a_finalist_that_fails_under_stress_cannot_win_and_keeps_its_own_reason():
    failures = {tactic("other"): "RuntimeError: planted failure"}
    for of_default in ((10.0,), None):
        verdict = _decided(10.0, 5.0, [of_default, None], failures)
        assert verdict.tactic == tactic("default")
        assert verdict.cliffs == {}


class _Stressed:
    """A bench that answers what is planted, one list of samples a call, and counts the calls of each tactic."""

    def __init__(self, **planted):
        self.failures, self.calls, self._planted = {}, Counter(), {tactic(name): them for name, them in planted.items()}

    def samples(self, tactics, draws):
        answers = []
        for played in tactics:
            answers.append(self._planted[played][self.calls[played]])
            self.calls[played] += 1
        assert all(len(answer) == len(draws) for answer in answers)
        return answers


def _stressed(**planted):
    """The verdict where `other` beats the default and `next` is second, and the bench."""
    finalists = {tactic("other"): (5.0,) * 20, tactic("next"): (6.0,) * 20}
    bench = _Stressed(default=[(20.0,), (20.0,) * 5], next=[(7.0,), (7.0,) * 5], **planted)
    return decide(Final(tactic("default"), (10.0,) * 20, 0.0, finalists, tuple(range(20))), bench, {"2": 1}), bench


def test_where_all_stand_the_stress_they_are_timed_once():
    verdict, bench = _stressed(other=[(8.0,)])
    assert verdict.tactic == tactic("other")
    assert set(bench.calls.values()) == {1}


def test_where_one_seems_to_fall_off_a_cliff_all_are_timed_again_and_the_medians_count():
    verdict, bench = _stressed(other=[(30.0,), (31.0, 32.0, 8.0, 8.0, 33.0)])
    assert verdict.tactic == tactic("next")
    assert verdict.cliffs.keys() == {tactic("other")}
    assert "4.4 times" in verdict.cliffs[tactic("other")]
    assert set(bench.calls.values()) == {2}


def test_a_hiccup_under_stress_is_no_cliff():
    verdict, _ = _stressed(other=[(30.0,), (8.0, 30.0, 8.0, 30.0, 8.0)])
    assert verdict.tactic == tactic("other")
    assert verdict.stress_us == {"2": 8.0}
    assert verdict.cliffs == {}


def test_a_finalist_that_stands_the_stress_under_which_the_default_fails_wins():
    verdict = _decided(10.0, 5.0, [None, (12.0,)], {tactic("default"): "RuntimeError: planted failure"})
    assert verdict.tactic == tactic("other")
    assert verdict.stress_us == {"2": 12.0}
    assert verdict.default_stress_us == {"2": float("inf")}


class _Drifting:
    """Tactics by their µs, all times a factor that drifts from round to round; counts how often each was timed.

    `hiccup`: who takes three times as long in the first two rounds. `apart`: by what factor the second of two series of
    one tactic is longer. `fails`: who, and from which call on.
    """

    def __init__(self, us, *, hiccup=None, apart=1.0, fails=(None, 0)):
        self.us, self.failures, self.timed, self.calls = us, {}, Counter(), 0
        self._hiccup, self._apart, self._fails = hiccup, apart, fails
        self._chance = random.Random(0)

    def samples(self, tactics, draws):
        self.calls += 1
        if self._fails[0] in tactics and self.calls >= self._fails[1]:
            self.failures[self._fails[0]] = "planted"
        drift = [1 + 0.3 * self._chance.random() for _ in draws]
        taken, seen = [], set()
        for played in tactics:
            self.timed[played] += len(draws)
            factor = self._apart if played in seen else 1.0
            seen.add(played)
            series = [self.us[played] * factor * each * self._chance.gauss(1, 1e-3) for each in drift]
            if played == self._hiccup and self.calls == 1:
                series[:2] = [3 * once_us for once_us in series[:2]]
            taken.append(None if played in self.failures else tuple(series))
        return taken


def test_a_default_that_is_far_behind_plays_the_opening_only_and_takes_its_stragglers_with_it():
    bench = _Drifting({DEFAULT: 50.0, GOOD: 10.0, NEXT: 10.2, POOR: 12.0})
    final = play(bench, DEFAULT, [NEXT, GOOD, POOR], range(16))
    assert len(final.default_us) == len(final.finalists[POOR]) == OPENING
    assert len(final.finalists[GOOD]) == len(final.finalists[NEXT]) == SAMPLES[1]
    assert bench.timed[DEFAULT] == bench.timed[POOR] == OPENING
    verdict = decide(final, bench, {"2": 0})
    assert verdict.tactic == GOOD
    assert verdict.gain.value == pytest.approx(5.0, rel=0.01)
    assert 0 < final.noise < 0.01


def test_the_noise_of_such_a_final_is_that_of_its_leader():
    quiet = play(_Drifting({DEFAULT: 50.0, GOOD: 10.0}), DEFAULT, [GOOD], range(16))
    torn = play(_Drifting({DEFAULT: 50.0, GOOD: 10.0}, apart=1.1), DEFAULT, [GOOD], range(16))
    assert quiet.noise < 0.01
    assert torn.noise == pytest.approx(0.1, abs=0.01)


def test_a_default_that_is_near_is_timed_twice_as_it_is_to_be_beaten():
    bench = _Drifting({DEFAULT: 10.0, GOOD: 9.0}, apart=1.1)
    final = play(bench, DEFAULT, [GOOD], range(16))
    assert final.noise == pytest.approx(0.1, abs=0.01)
    assert bench.timed[DEFAULT] == 2 * len(final.draws) - 1  # who it is is known after the first round
    assert bench.timed[GOOD] == len(final.draws) + 1


@pytest.mark.parametrize("hiccup", [DEFAULT, GOOD, NEXT, None])
def test_who_only_a_hiccup_put_behind_plays_to_the_end(hiccup):
    bench = _Drifting({DEFAULT: 10.0, GOOD: 9.0, NEXT: 9.1, POOR: 12.0}, hiccup=hiccup)
    final = play(bench, DEFAULT, [GOOD, NEXT, POOR], range(16))
    assert len(final.default_us) == len(final.finalists[GOOD]) == len(final.finalists[NEXT]) >= SAMPLES[1] - 2
    assert len(final.finalists[POOR]) <= OPENING or hiccup == GOOD
    assert decide(final, bench, {"2": 0}).tactic == (NEXT if hiccup == GOOD else GOOD)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_leader_that_fails_at_any_time_leaves_the_final_to_the_others(call):
    bench = _Drifting({DEFAULT: 50.0, GOOD: 10.0, NEXT: 10.2}, fails=(GOOD, call))
    final = play(bench, DEFAULT, [GOOD, NEXT], range(16))
    assert final.finalists.keys() == {NEXT}
    assert decide(final, bench, {"2": 0}).tactic == NEXT


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("others", [(), (POOR,)])
def test_where_all_who_went_on_fail_those_who_had_left_play_anew(call, others):
    """`GOOD` alone goes on after the opening, and fails in some call."""
    bench = _Uneven({DEFAULT: (50.0, 50.0), GOOD: (9.0, 10.0), POOR: (12.0, 12.0)}, fails=(GOOD, call))
    final = play(bench, DEFAULT, [GOOD, *others], UNSEEN, seconds=1e-6)
    assert bench.failures.keys() == {GOOD}
    assert final.finalists.keys() == set(others)
    assert all(len(series) == len(final.draws) >= SAMPLES[0] for series in final.finalists.values())
    assert decide(final, bench, {"2": 0}).tactic == (others or (DEFAULT,))[0]


@pytest.mark.parametrize(("default_us", "call"), [(50.0, 1), (50.0, 2), (10.0, 1), (10.0, 2), (10.0, 3)])
def test_a_default_that_fails_leaves_no_result(default_us, call):
    bench = _Drifting({DEFAULT: default_us, GOOD: 10.0}, fails=(DEFAULT, call))
    with pytest.raises(NoResultError, match="planted"):
        play(bench, DEFAULT, [GOOD], range(16))


@given(st.lists(st.floats(1, 100), min_size=2, max_size=7), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_fastest_beyond_the_noise_wins_however_far_the_default_is_behind(us, seconds):
    players = [tactic(f"number {number}") for number in range(len(us))]
    bench = _Drifting(dict(zip(players, us, strict=True)))
    final = play(bench, players[0], players[1:], range(16), seconds)
    winner = decide(final, bench, {"2": 0}).tactic
    assert bench.us[winner] <= 1.005 * min(us) or (winner == players[0] and us[0] < 1.01 * min(us))
    assert len(final.default_us) >= OPENING


@pytest.fixture
def finals_s(monkeypatch):
    """Of every final that is played: about how long it may take, and how long if it is prolonged."""
    given, real = [], final_module.play

    def recorded(bench, default, finalists, draws, seconds, *, most_s, alternate):
        given.append((seconds, most_s))
        return real(bench, default, finalists, draws, 0.01, most_s=min(most_s, 0.01), alternate=alternate)

    monkeypatch.setattr(final_module, "play", recorded)
    return given


@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_a_backend_says_how_long_its_finals_may_take(plant, seconds, finals_s):
    backend = plant(milliseconds={"default": 1.0, "fast": 0.1})
    _tune()
    backend.final_s = seconds
    _tune(again=True)
    assert finals_s == [(None, final_module.SECONDS)] * 2 + [(seconds, final_module.SECONDS)] * 2


@pytest.mark.parametrize("time_budget_s", [None, 1e4, 1.0, 0.02])
def test_a_final_takes_no_more_than_its_share_of_the_time(plant, time_budget_s, finals_s):
    plant(milliseconds={"default": 0.2, "fast": 0.1})
    _tune(time_budget_s=time_budget_s)
    most = [most_s for _, most_s in finals_s]
    assert most
    if time_budget_s in (None, 1e4):
        assert set(most) == {final_module.SECONDS}
    else:
        assert all(0 <= most_s <= FINAL_SHARE * time_budget_s for most_s in most)


def test_a_search_of_the_backend_s_own_is_used_and_warm_started(plant):
    """It proposes one tactic besides the default, and in the next bucket is told which ones were good."""
    backend = plant(milliseconds={"default": 8.0, "fast": 2.5, "faster": 0.1})
    told = []

    def search(problem, candidates, starts):
        if problem.rows == 8 or not told:
            told.append(tuple(starts))
        times = yield Batch((tactic("default"), tactic("fast")))
        return tuple(sorted(times, key=times.__getitem__))

    backend.search = search
    profile = _tune()
    assert {choice.tactic for choice in profile.choices} == {tactic("fast")}
    assert {choice.tried for choice in profile.choices} == {2}
    assert told[0] == ()
    assert told[-1] == (tactic("fast"), tactic("default"))
    exhaustive = _tune(again=True, strategy="exhaustive")
    assert {choice.tactic for choice in exhaustive.choices} == {tactic("faster")}


def test_a_time_budget_ends_searches_early_and_leaves_the_last_buckets_to_the_next_run(plant):
    backend = plant(milliseconds={"default": 5.0, "slow": 5.0})

    def search(problem, candidates, starts):
        yield Batch((tactic("default"),))
        yield Batch((tactic("slow"),), rounds=100)
        raise AssertionError("the search must have been ended")

    backend.search = search
    events = []
    profile = _tune(time_budget_s=0.004, on_event=events.append)
    assert [choice.rows for choice in profile.choices] == [4]
    assert [event for event in events if isinstance(event, BucketsSkipped)] == [BucketsSkipped((8,))]
    assert [event for event in events if isinstance(event, SearchStopped)] == [SearchStopped(4, 1, 2)]
    assert [choice.rows for choice in _tune(strategy="exhaustive").choices] == [4, 8]


def test_the_preparation_of_a_bucket_counts_against_its_share(plant, monkeypatch):
    backend = plant(milliseconds={"default": 5.0})
    real, batches = PlantedBackend.prepare, []

    def prepare(self, problem):
        time.sleep(0.4)
        return real(self, problem)

    def search(problem, candidates, starts):
        while True:
            batches.append((yield Batch((tactic("default"),))))

    monkeypatch.setattr(PlantedBackend, "prepare", prepare)
    backend.search = search
    _tune(Regime(ladder="4", draws=4), time_budget_s=0.42)
    assert len(batches) < 10  # 0.6 of 0.42 s are 50


def test_starts_are_of_the_nearest_buckets_whatever_was_tuned_before(plant):
    backend = plant(milliseconds={"default": 1.0, "a": 0.1, "b": 0.1, "c": 0.1})
    winners, told = {1: "a", 8: "b", 64: "c"}, {}

    def search(problem, candidates, starts):
        told[problem.rows] = starts
        yield Batch((tactic(winners[problem.rows]),))
        return (tactic(winners[problem.rows]),)

    def interrupt(event):
        if isinstance(event, BucketChosen) and event.choice.rows == 8:
            raise KeyboardInterrupt

    backend.search = search
    regime = Regime(ladder="1,8,64", draws=1)
    with pytest.raises(KeyboardInterrupt):
        _tune(regime, on_event=interrupt)
    assert told == {1: (), 8: (tactic("a"),)}
    _tune(regime)
    assert told[64] == (tactic("b"), tactic("a"))


def test_on_a_cpu_nothing_is_drawn_while_a_bucket_is_measured(plant, monkeypatch):
    drawn = []
    real = Bucket.of

    def of(layer, regime, backend, device, rows):
        drawn.append(rows)
        return real(layer, regime, backend, device, rows)

    monkeypatch.setattr(Bucket, "of", of)
    plant(milliseconds={"default": 1.0, "fast": 0.1})
    _tune(on_event=lambda event: isinstance(event, BucketChosen) and event.index == 0 and drawn.append("chosen"))
    assert drawn == [4, "chosen", 8]


def test_on_a_gpu_later_buckets_are_drawn_meanwhile_and_what_fails_there_comes_in_its_turn(plant, monkeypatch):
    threads, real = {}, Bucket.of

    def of(layer, regime, backend, device, rows):
        threads[rows] = threading.current_thread()
        if rows == 8:
            raise UsageError("No such rows.")
        return real(layer, regime, backend, device, rows)

    monkeypatch.setattr(sys.modules["moetune.tuning.tune"], "_draws_ahead", lambda device: True)
    monkeypatch.setattr(Bucket, "of", of)
    plant(milliseconds={"default": 1.0, "fast": 0.1})
    events = []
    with pytest.raises(UsageError, match="No such rows"):
        _tune(on_event=events.append)
    assert [event.choice.tactic for event in events if isinstance(event, BucketChosen)] == [tactic("fast")]
    assert threads.keys() == {4, 8}
    assert threading.current_thread() not in threads.values()
    assert not any(thread.is_alive() for thread in threads.values())


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_time_budget_is_positive(plant, seconds):
    plant(milliseconds={"default": 1.0})
    with pytest.raises(UsageError, match="time budget must be positive"):
        _tune(time_budget_s=seconds)


def test_in_a_worker_a_tactic_that_kills_its_process_costs_only_itself(tmp_path):
    """The planted backend is pickled: what it prepares is counted in another process, so not here."""
    backend = PlantedBackend({"default": 4.0, "fast": 0.2, "killer": 0.1}, killing=frozenset({"killer"}))
    choice = tune(LAYER, Regime(ep_size=2, attention_dp=True, ladder="4", draws=2), backend, device="cpu").choices[0]
    assert choice.tactic == tactic("fast")
    assert [rejection.tactic for rejection in choice.rejected] == [tactic("killer")]
    assert "SIGKILL" in choice.rejected[0].reason
    assert backend.prepared == []
