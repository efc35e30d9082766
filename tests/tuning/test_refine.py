"""The ladder `adaptive` adds buckets where the choices of two neighbors differ."""

from itertools import pairwise

import pytest
from choices import make_choice
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import LAYER, tactic
from runs import tune_planted

from moetune.errors import MissError
from moetune.spec.ladder import ADAPTIVE_STEP
from moetune.spec.regime import Regime
from moetune.tuning.events import BucketChosen, Served, TacticMeasured
from moetune.tuning.refine import all_buckets, further_bucket, missing_buckets
from moetune.tuning.tune import load

REGIME = Regime(ladder="adaptive", tune_max_num_tokens=300, draws=2)


def made_choice(rows, name, **changed):
    return make_choice(rows, tactic=tactic(name), **changed)


def _refined(winner, buckets):
    """All buckets of a profile whose choice at each row count is `winner(rows)`."""
    rows = list(buckets)
    while (added := further_bucket([made_choice(at, winner(at)) for at in sorted(rows)])) is not None:
        assert added not in rows
        rows.append(added)
    return sorted(rows)


def test_no_bucket_is_added_where_neighbors_have_one_choice():
    assert _refined(lambda rows: "same", (1, 64, 4096)) == [1, 64, 4096]


def test_a_crossover_is_found_by_halving_the_gap():
    assert _refined(lambda rows: "small" if rows < 300 else "large", (128, 512)) == [128, 256, 304, 360, 512]


def test_a_tactic_that_is_equally_fast_in_the_neighbor_needs_no_bucket_between():
    other = tactic("b")
    assert further_bucket([made_choice(128, "a", equally_fast=(other,)), made_choice(256, "b")]) is None
    assert further_bucket([made_choice(128, "a"), made_choice(256, "b")]) == 184


@settings(max_examples=50)
@given(st.lists(st.integers(2, 8000), max_size=6))
def test_between_two_different_choices_there_is_at_most_one_step(crossovers):
    def winner(rows):
        return str(sum(rows >= crossover for crossover in crossovers))

    rows = _refined(winner, Regime(ladder="adaptive").buckets)
    for lower, upper in pairwise(rows):
        assert winner(lower) == winner(upper) or upper <= max(ADAPTIVE_STEP * lower, lower + 1)
    assert len(rows) <= len(Regime(ladder="adaptive").buckets) + 2 * len(set(crossovers))


def test_a_tune_finds_the_crossover_and_serves_both_sides(plant, tmp_path):
    """From 150 rows on `large` is the fastest; the default is never."""
    plant(
        milliseconds={"default": 5.0, "small": 1.0, "large": 2.0},
        milliseconds_from={("small", 150): 4.0},
    )
    events = []
    profile = tune_planted(REGIME, store=tmp_path, on_event=events.append)
    rows = [choice.rows for choice in profile.choices]
    assert set(REGIME.buckets) < set(rows)
    for choice in profile.choices:
        assert choice.tactic == tactic("small" if choice.rows < 150 else "large")
    for run_time in range(1, 301):
        best = tactic("small" if run_time < 140 else "large")
        assert profile.tactic(run_time) == best or 130 <= run_time <= 165
    chosen = [event.choice.rows for event in events if isinstance(event, BucketChosen)]
    assert sorted(chosen) == rows
    assert chosen[:12] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256]
    measured = {event.rows for event in events if isinstance(event, TacticMeasured)}
    assert measured == set(rows)
    again = []
    assert tune_planted(REGIME, store=tmp_path, on_event=again.append) == profile
    assert [type(event) for event in again] == [Served]
    assert load(LAYER, REGIME, "planted", tmp_path, device="cpu") == profile


def test_a_tune_that_ended_before_the_last_added_bucket_goes_on_there(plant, tmp_path):
    plant(milliseconds={"default": 5.0, "small": 1.0, "large": 2.0}, milliseconds_from={("small", 150): 4.0})
    whole = tune_planted(REGIME, store=tmp_path / "whole")
    added = {choice.rows for choice in whole.choices} - set(REGIME.buckets)

    class StoppedError(Exception):
        pass

    def stop(event):
        if isinstance(event, BucketChosen) and event.choice.rows in added:
            raise StoppedError

    with pytest.raises(StoppedError):
        tune_planted(REGIME, store=tmp_path / "parts", on_event=stop)
    begun = load(LAYER, REGIME, "planted", tmp_path / "parts", device="cpu")
    assert len(begun.choices) < len(whole.choices) or len(added) == 1
    resumed = tune_planted(REGIME, store=tmp_path / "parts")
    assert missing_buckets(REGIME, resumed) == ()
    assert {choice.rows: choice.tactic for choice in resumed.choices} == {
        choice.rows: choice.tactic for choice in whole.choices
    }


def test_again_also_measures_the_buckets_that_an_earlier_tune_added(plant, tmp_path):
    plant(milliseconds={"default": 5.0, "small": 1.0, "large": 2.0}, milliseconds_from={("small", 150): 4.0})
    first = tune_planted(REGIME, store=tmp_path)
    rows = [choice.rows for choice in first.choices]
    added = [at for at in rows if at not in REGIME.buckets]
    assert added
    assert all_buckets(REGIME, first) == (*REGIME.buckets, *added)
    plant(milliseconds={"default": 5.0, "small": 3.0, "large": 2.0})
    events = []
    again = tune_planted(REGIME, store=tmp_path, again=True, on_event=events.append)
    measured = [event.choice.rows for event in events if isinstance(event, BucketChosen)]
    assert sorted(measured) == rows
    assert [choice.rows for choice in again.choices] == rows
    assert {choice.tactic for choice in again.choices} == {tactic("large")}


def test_again_without_a_stored_profile_measures_the_buckets_of_the_ladder(plant, tmp_path):
    plant(milliseconds={"default": 5.0, "small": 1.0})
    assert all_buckets(REGIME, None) == REGIME.buckets
    assert [choice.rows for choice in tune_planted(REGIME, store=tmp_path, again=True).choices] == list(REGIME.buckets)


def test_a_profile_of_the_ladder_vllm_is_served_and_again_measures_the_buckets_between(plant, tmp_path):
    backend = plant(milliseconds={"default": 5.0, "small": 1.0, "large": 2.0}, milliseconds_from={("small", 150): 4.0})
    coarser = Regime(**{**REGIME.model_dump(), "ladder": "vllm"})
    assert REGIME.coarser == coarser
    stored = tune_planted(coarser, store=tmp_path)
    backend.prepared.clear()
    events = []
    assert tune_planted(REGIME, store=tmp_path, on_event=events.append) == stored
    assert tune_planted(REGIME, store=tmp_path, frozen=True) == stored
    assert load(LAYER, REGIME, "planted", tmp_path, device="cpu") == stored
    assert backend.prepared == []
    (served,) = events
    assert [(each.field, each.wanted, each.stored) for each in served.differences] == [("ladder", "adaptive", "vllm")]
    again = tune_planted(REGIME, store=tmp_path, again=True)
    assert set(REGIME.buckets) < {choice.rows for choice in again.choices}
    assert tune_planted(REGIME, store=tmp_path) == again
    assert tune_planted(coarser, store=tmp_path) == stored


def test_a_profile_of_the_ladder_vllm_that_lacks_buckets_is_not_served(plant, tmp_path):
    plant(milliseconds={"default": 1.0})
    coarser = Regime(**{**REGIME.model_dump(), "ladder": "vllm"})
    stored = tune_planted(coarser, store=tmp_path)
    (path,) = tmp_path.glob("*/*/*/*.json")
    path.write_text(stored.model_copy(update={"choices": stored.choices[:-1]}).model_dump_json())
    with pytest.raises(MissError, match=f"lacks the buckets {coarser.buckets[-1]}\\."):
        tune_planted(REGIME, store=tmp_path, frozen=True)
    assert [choice.rows for choice in tune_planted(REGIME, store=tmp_path).choices] == list(REGIME.buckets)


def test_the_tactics_of_the_ladder_vllm_can_be_checked_instead_of_a_search(plant, tmp_path):
    plant(milliseconds={"default": 5.0, "small": 1.0, "large": 2.0}, milliseconds_from={("small", 150): 4.0})
    tune_planted(Regime(**{**REGIME.model_dump(), "ladder": "vllm"}), store=tmp_path)
    checked = tune_planted(REGIME, store=tmp_path, start="near")
    assert checked.regime == REGIME
    assert set(REGIME.buckets) <= {choice.rows for choice in checked.choices}
    assert {choice.tactic for choice in checked.choices} == {tactic("small"), tactic("large")}
