"""What the store answers is not measured again."""

import pytest
from planted import LAYER, PlantedBackend, tactic
from runs import REGIME, tune_planted

from moetune.errors import MissError, UsageError
from moetune.spec.enums import DISTRIBUTION_VARIABLE
from moetune.spec.regime import Regime
from moetune.store.store import Store
from moetune.tuning.events import (
    BucketChosen,
    Served,
)
from moetune.tuning.tune import load, tune


def test_the_second_run_is_served_without_measuring(plant):
    backend = plant(milliseconds={"default": 1.0, "fast": 0.3})
    first = tune_planted()
    backend.prepared.clear()
    events = []
    assert tune_planted(on_event=events.append) == first
    assert [type(event) for event in events] == [Served]
    assert backend.prepared == []
    assert load(LAYER, REGIME, "planted", device="cpu") == first


def test_again_measures_anew(plant):
    backend = plant(milliseconds={"default": 1.0})
    tune_planted()
    backend.prepared.clear()
    tune_planted(again=True)
    assert backend.prepared == [4, 8]


@pytest.mark.parametrize("packaged", [False, True])
def test_again_replaces_a_choice_that_was_measured_in_the_future(plant, tmp_path, packaged):
    """The clock of the machine that measured it was wrong."""
    plant(milliseconds={"default": 1.0, "fast": 0.5})
    theirs = Store(tmp_path / "theirs")
    profile = tune_planted(store=theirs)
    future = tuple(
        choice.model_copy(update={"tactic": choice.default_tactic, "measured_at": "2999-01-01T00:00:00Z"})
        for choice in profile.choices
    )
    theirs.save(profile.model_copy(update={"choices": future}))
    store = Store(tmp_path / "ours", packaged=theirs.root) if packaged else theirs
    assert {choice.tactic for choice in tune_planted(store=store).choices} == {tactic("default")}
    again = tune_planted(store=store, again=True)
    assert {choice.tactic for choice in again.choices} == {tactic("fast")}
    assert tune_planted(store=store) == again


def test_a_packaged_profile_of_some_buckets_is_the_base_of_the_answer(plant, tmp_path):
    backend = plant(milliseconds={"default": 1.0})
    packaged = tmp_path / "packaged"

    def interrupt(event):
        if isinstance(event, BucketChosen):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_planted(store=packaged, on_event=interrupt)
    (path,) = packaged.glob("*/*/*/*.json")
    before = path.read_bytes()
    backend.prepared.clear()

    store = Store(tmp_path / "store", packaged)
    with pytest.raises(MissError, match="buckets 8"):
        tune_planted(store=store, frozen=True)
    profile = tune_planted(store=store)
    assert backend.prepared == [8]
    assert [choice.rows for choice in profile.choices] == [4, 8]
    assert Store(tmp_path / "store").find(LAYER, REGIME, "planted", profile.environment)[1] == profile
    assert path.read_bytes() == before
    events = []
    tune_planted(store=store, on_event=events.append)
    assert [(type(event), event.packaged) for event in events] == [(Served, False)]


def test_a_whole_packaged_profile_is_served_even_where_the_store_cannot_be_written(plant, tmp_path):
    backend = plant(milliseconds={"default": 1.0})
    profile = tune_planted(store=tmp_path / "packaged")
    backend.prepared.clear()
    (tmp_path / "file").write_text("in the way")
    events = []
    store = Store(tmp_path / "file", tmp_path / "packaged")
    assert tune_planted(store=store, on_event=events.append) == profile
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
    tune_planted()
    with pytest.raises(UsageError, match="--frozen never measures"):
        tune_planted(frozen=True, again=True)


def test_frozen_never_measures_and_names_what_differs(plant):
    backend = plant(milliseconds={"default": 1.0})
    tune_planted()
    backend.prepared.clear()
    other = Regime(ep_size=2, attention_dp=False, ladder="4,8", draws=4)
    with pytest.raises(MissError) as miss:
        tune_planted(other, frozen=True)
    assert "attention_dp" in {difference.field for difference in miss.value.differences}
    assert "attention_dp" in str(miss.value)
    assert backend.prepared == []


def test_the_environment_gives_the_distribution_unless_one_was_given(plant, monkeypatch):
    plant(milliseconds={"default": 0.1})
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "BALANCED")
    assert tune_planted(Regime(ladder="2")).regime.distribution == "balanced"
    assert tune_planted(Regime(ladder="2", distribution="random")).regime.distribution == "random"
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "foo")
    with pytest.raises(UsageError, match="balanced, random"):
        tune_planted(Regime(ladder="2"))


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_time_budget_is_positive(plant, seconds):
    plant(milliseconds={"default": 1.0})
    with pytest.raises(UsageError, match="time budget must be positive"):
        tune_planted(time_budget_s=seconds)
