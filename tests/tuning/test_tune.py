"""Every bucket of a regime gets the fastest right tactic."""

from collections import Counter

import pytest
from planted import LAYER, PlantedBackend, PlantedRunner, tactic
from runs import REGIME, tune_planted

from moetune.errors import DefaultFailedError, NoResultError
from moetune.measure.bench import Bench
from moetune.search.base import Batch
from moetune.spec.regime import Regime
from moetune.store.store import Store
from moetune.tuning.events import (
    BucketChosen,
    BucketFailed,
    TacticMeasured,
)
from moetune.tuning.tune import tune


def test_the_fastest_right_tactic_replaces_the_default_in_every_bucket(plant):
    plant(milliseconds={"default": 6.0, "fast": 0.2, "middling": 3.0})
    profile = tune_planted()
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
    assert {choice.tactic for choice in tune_planted().choices} == {tactic("default")}


def test_a_tactic_that_raises_or_is_wrong_costs_only_itself(plant):
    plant(
        milliseconds={"default": 4.0, "fast": 0.2, "broken": 0.1, "liar": 0.1},
        raising=frozenset({"broken"}),
        wrong=frozenset({"liar"}),
    )
    events = []
    profile = tune_planted(on_event=events.append)
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
    choice = tune_planted().choices[0]
    assert choice.tactic == tactic("steady")
    assert any(r.tactic == tactic("trap") and r.reason.startswith("cliff") for r in choice.rejected)


def test_a_tactic_that_is_right_on_even_draws_only_cannot_win(plant):
    """The search's check is on draw 0."""
    plant(milliseconds={"default": 5.0, "liar": 0.5, "honest": 2.0}, wrong_on_odd_draws=frozenset({"liar"}))
    for choice in tune_planted().choices:
        assert choice.tactic == tactic("honest")
        assert any(r.tactic == tactic("liar") and "wrong result" in r.reason for r in choice.rejected)


def test_a_tactic_that_is_right_the_first_five_times_only_cannot_win(plant):
    plant(milliseconds={"default": 5.0, "liar": 0.5, "honest": 2.0}, wrong_after={"liar": 5})
    for choice in tune_planted().choices:
        assert choice.tactic == tactic("honest")
        assert any(r.tactic == tactic("liar") and "wrong result" in r.reason for r in choice.rejected)


def test_a_tactic_that_is_wrong_under_stress_only_cannot_win(plant):
    plant(milliseconds={"default": 5.0, "liar": 0.5, "honest": 2.0}, wrong_under_stress=frozenset({"liar"}))
    for choice in tune_planted().choices:
        assert choice.tactic == tactic("honest")


def test_a_tactic_that_loses_at_one_row_count_of_the_bucket_cannot_win(plant):
    """`own` is the fastest at the bucket's own rows and slower than the default at the most rows that map to it."""
    backend = plant(milliseconds={"default": 5.0, "own": 1.0, "whole": 3.0}, milliseconds_at={("own", 6): 6.0})
    profile = tune_planted(Regime(ladder="vllm", draws=4, tune_max_num_tokens=8))
    by_rows = {choice.rows: choice for choice in profile.choices}
    assert backend.prepared
    assert [compared.rows for compared in by_rows[4].by_rows] == [4, 6]
    assert by_rows[4].tactic == tactic("whole")
    assert by_rows[4].gain == pytest.approx(5 / 3, rel=0.01)
    assert by_rows[2].tactic == tactic("own")


def test_without_a_working_default_there_is_no_result(plant):
    plant(milliseconds={"default": 1.0, "fast": 0.5}, raising=frozenset({"default"}))
    with pytest.raises(NoResultError, match="planted failure"):
        tune_planted()


@pytest.mark.parametrize("kind", ["search", "final"])
@pytest.mark.parametrize(("rows", "left"), [({4}, [8]), ({8}, [4]), ({4, 8}, [])])
def test_a_default_that_fails_in_one_bucket_does_not_end_the_others(plant, monkeypatch, tmp_path, rows, left, kind):
    plant(milliseconds={"default": 1.0, "fast": 0.5})
    real = PlantedRunner.run

    def run(self, tactic, draw=0):
        if tactic["algorithm"] == "default" and self.problem.rows in rows and self.problem.draws[draw].kind == kind:
            raise RuntimeError("planted failure")
        return real(self, tactic, draw)

    monkeypatch.setattr(PlantedRunner, "run", run)
    events = []
    with pytest.raises(DefaultFailedError, match="planted failure") as raised:
        tune_planted(Regime(ladder="4,8", draws=2), store=tmp_path, on_event=events.append)
    assert ("Defaults failed in 1 more bucket" in str(raised.value)) == (len(rows) == 2)
    assert {event.rows for event in events if isinstance(event, BucketFailed)} == rows
    saved = [choice.rows for _, profile in Store(tmp_path).profiles() for choice in profile.choices]
    assert saved == left


def test_a_bucket_that_the_ladder_adds_and_that_fails_is_not_tried_for_ever(plant, monkeypatch):
    plant(milliseconds={"default": 5.0, "small": 1.0, "large": 2.0}, milliseconds_from={("small", 150): 4.0})
    real = PlantedRunner.run

    def run(self, tactic, draw=0):
        is_search = self.problem.draws[draw].kind == "search"
        if tactic["algorithm"] == "default" and 128 < self.problem.rows < 256 and is_search:
            raise RuntimeError("planted failure")
        return real(self, tactic, draw)

    monkeypatch.setattr(PlantedRunner, "run", run)
    events = []
    with pytest.raises(DefaultFailedError):
        tune_planted(Regime(ladder="adaptive", tune_max_num_tokens=300, draws=2), on_event=events.append)
    (failed,) = [event.rows for event in events if isinstance(event, BucketFailed)]
    assert 128 < failed < 256


def test_a_search_times_a_bucket_of_two_row_counts_with_its_rounds_of_each(plant, monkeypatch):
    plant(milliseconds={"default": 0.2, "fast": 0.1})
    searched, prepared, samples = {}, Bench.__init__, Bench.samples

    def prepare(bench, backend, problem, **options):
        bench.problem = problem
        prepared(bench, backend, problem, **options)

    def record(bench, tactics, draws, limit_us=float("inf")):
        rows = Counter(bench.problem.draws[draw].rows for draw in draws)
        searched.setdefault(bench.problem.rows, rows)
        return samples(bench, tactics, draws, limit_us)

    monkeypatch.setattr(Bench, "__init__", prepare)
    monkeypatch.setattr(Bench, "samples", record)
    profile = tune_planted(Regime(ep_size=2, layout="deduplicated", tune_max_num_tokens=8, draws=4))
    compared = {choice.rows: [each.rows for each in choice.by_rows] for choice in profile.choices}
    assert compared == {1: [1], 2: [2, 3], 4: [4, 6, 7], 8: [8]}
    rounds = searched[2][2]
    assert searched[6] == {4: rounds, 6: rounds}


def test_the_load_is_stored_with_the_choice(plant):
    plant(milliseconds={"default": 0.1})
    choice = tune_planted().choices[0]
    assert sum(choice.load) == 4 * LAYER.top_k * REGIME.draws
    assert len(choice.load) == LAYER.num_experts // REGIME.ep_size
    assert max(choice.load) / REGIME.draws <= choice.max_load <= 4


def test_a_search_of_the_backend_s_own_is_used_and_warm_started(plant):
    """It proposes one tactic besides the default, and in the next bucket it gets the fast ones as warm starts."""
    backend = plant(milliseconds={"default": 8.0, "fast": 2.5, "faster": 0.1})
    given = []

    def search(problem, candidates, warm_starts):
        if problem.rows == 8 or not given:
            given.append(tuple(warm_starts))
        times = yield Batch((tactic("default"), tactic("fast")))
        return tuple(sorted(times, key=times.__getitem__))

    backend.search = search
    profile = tune_planted()
    assert {choice.tactic for choice in profile.choices} == {tactic("fast")}
    assert {choice.tried for choice in profile.choices} == {2}
    assert given[0] == ()
    assert given[-1] == (tactic("fast"), tactic("default"))
    exhaustive = tune_planted(again=True, strategy="exhaustive")
    assert {choice.tactic for choice in exhaustive.choices} == {tactic("faster")}


def test_warm_starts_are_of_the_nearest_buckets_whatever_was_tuned_before(plant):
    backend = plant(milliseconds={"default": 1.0, "a": 0.1, "b": 0.1, "c": 0.1})
    winners, given = {1: "a", 8: "b", 64: "c"}, {}

    def search(problem, candidates, warm_starts):
        given[problem.rows] = warm_starts
        yield Batch((tactic(winners[problem.rows]),))
        return (tactic(winners[problem.rows]),)

    def interrupt(event):
        if isinstance(event, BucketChosen) and event.choice.rows == 8:
            raise KeyboardInterrupt

    backend.search = search
    regime = Regime(ladder="1,8,64", draws=1)
    with pytest.raises(KeyboardInterrupt):
        tune_planted(regime, on_event=interrupt)
    assert given == {1: (), 8: (tactic("a"),)}
    tune_planted(regime)
    assert given[64] == (tactic("b"), tactic("a"))


@pytest.mark.slow
def test_in_a_worker_a_tactic_that_kills_its_process_costs_only_itself(tmp_path):
    """The planted backend is pickled: what it prepares is counted in another process, so not here."""
    backend = PlantedBackend({"default": 4.0, "fast": 0.2, "killer": 0.1}, killing=frozenset({"killer"}))
    choice = tune(LAYER, Regime(ep_size=2, attention_dp=True, ladder="4", draws=2), backend, device="cpu").choices[0]
    assert choice.tactic == tactic("fast")
    assert [rejection.tactic for rejection in choice.rejected] == [tactic("killer")]
    assert "SIGKILL" in choice.rejected[0].reason
    assert backend.prepared == []


def test_one_tactic_serves_every_step_of_the_batched_layout_and_is_slower_than_the_default_in_none(plant):
    """`small` is the fastest in the typical step and slower than the default in a full one, so it cannot win."""
    plant(
        milliseconds={"default": 2.0, "small": 0.5, "all": 1.0},
        milliseconds_from={("small", 64): 4.0, ("all", 64): 1.5},
    )
    regime = Regime(ep_size=2, layout="batched", ladder=[64], draws=4)
    (choice,) = tune_planted(regime=regime).choices
    assert (choice.rows, choice.tactic) == (64, tactic("all"))
    assert {compared.rows: round(compared.gain, 1) for compared in choice.by_rows} == {16: 2.0, 64: 1.3, 4: 2.0, 2: 2.0}
