"""A tune that starts from an older profile measures its tactics, their neighbors and the default."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import LAYER, PlantedBackend, tactic
from runs import REGIME, tune_planted

from moetune.errors import MissError, UsageError
from moetune.search.revalidate import FIRST
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.store.versions import Versions
from moetune.tuning import prefetch
from moetune.tuning.events import Event, Revalidated, Served, TacticMeasured
from moetune.tuning.tune import load

MANY = {"default": 1.0, **{f"slow{number}": 2.0 + number for number in range(40)}, "old": 0.8, "new": 0.2}


@pytest.fixture
def older(plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    """A profile of many tactics, and a new environment: another version of the planted kernels, which is near."""
    plant(milliseconds={**MANY, "old": 0.1, "new": 5.0})
    profile = tune_planted(store=tmp_path / "store")
    assert {choice.tactic for choice in profile.choices} == {tactic("old")}
    monkeypatch.setattr(PlantedBackend, "environment", lambda self: {"planted": "2"})
    versions = {"planted": Versions(near=frozenset({"planted"}))}
    monkeypatch.setattr("moetune.store.versions._VERSIONS", versions)
    return profile


def measured(events: list[Event]) -> dict[int, set[str]]:
    by: dict[int, set[str]] = {}
    for event in events:
        if isinstance(event, TacticMeasured):
            by.setdefault(event.rows, set()).add(str(event.tactic))
    return by


@pytest.mark.parametrize("given", ["near", "path", "profile"])
def test_few_tactics_are_measured_and_a_new_profile_is_stored(plant, older, tmp_path, given) -> None:
    plant(milliseconds=MANY)
    path = Store(tmp_path / "store").path(LAYER, REGIME, "planted", older.environment)
    before, events = path.read_bytes(), []
    start = {"near": "near", "path": path, "profile": older}[given]
    profile = tune_planted(store=tmp_path / "store", start=start, on_event=events.append)
    assert [choice.rows for choice in profile.choices] == [4, 8]
    assert {choice.tactic for choice in profile.choices} == {tactic("old")}
    assert all(0.1 < 1 / choice.gain < 0.9 for choice in profile.choices)
    assert profile.environment.strict["planted"] == "2"
    assert load(LAYER, REGIME, "planted", tmp_path / "store", device="cpu") == profile
    assert path.read_bytes() == before

    assert isinstance(events[0], Revalidated)
    assert events[0].profile == older
    assert [each.field for each in events[0].differences] == ["planted"]
    for tactics in measured(events).values():
        assert tactics == {"default", "old"}
    assert all(choice.tried == 2 and choice.candidates == len(MANY) + 1 for choice in profile.choices)


def test_another_buckets_tactic_that_is_now_faster_is_found(plant, older, tmp_path) -> None:
    """The old winners differ by bucket; the one of the other bucket is fastest in both now."""
    choices = (older.choices[0], older.choices[1].model_copy(update={"tactic": tactic("new")}))
    start = older.model_copy(update={"choices": choices})
    plant(milliseconds=MANY)
    profile = tune_planted(store=tmp_path / "store", start=start)
    assert {choice.tactic for choice in profile.choices} == {tactic("new")}


def test_if_there_are_few_tactics_all_are_measured(plant, older, tmp_path) -> None:
    few = dict(list(MANY.items())[: FIRST - 2]) | {"old": 0.8, "new": 0.2}
    plant(milliseconds=few)
    events: list[Event] = []
    profile = tune_planted(store=tmp_path / "store", start="near", on_event=events.append)
    assert {choice.tactic for choice in profile.choices} == {tactic("new")}
    assert measured(events) == {4: set(few), 8: set(few)}


def test_an_old_winner_that_is_no_candidate_or_fails_leaves_the_default(plant, older, tmp_path) -> None:
    plant(milliseconds={name: time for name, time in MANY.items() if name != "old"})
    profile = tune_planted(store=tmp_path / "store", start=older)
    assert {choice.tactic for choice in profile.choices} == {tactic("default")}
    plant(milliseconds=MANY, raising=frozenset({"old"}))
    profile = tune_planted(store=tmp_path / "store", start=older, again=True)
    assert {choice.tactic for choice in profile.choices} == {tactic("default")}


def test_a_profile_of_this_very_environment_is_served_and_again_checks_it(plant, older, tmp_path) -> None:
    plant(milliseconds=MANY)
    first = tune_planted(store=tmp_path / "store", start="near")
    events: list[Event] = []
    assert tune_planted(store=tmp_path / "store", start="near", on_event=events.append) == first
    assert [type(event) for event in events] == [Served]
    tune_planted(store=tmp_path / "store", start="near", again=True, on_event=events.append)
    assert isinstance(events[1], Revalidated)
    assert events[1].differences == ()


def test_a_neutral_profile_is_checked_too_if_that_is_asked(plant, older, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("moetune.store.versions._VERSIONS", {"planted": Versions(neutral=frozenset({"planted"}))})
    backend = plant(milliseconds=MANY)
    assert tune_planted(store=tmp_path / "store") == older
    assert backend.prepared == []
    assert tune_planted(store=tmp_path / "store", start="near").environment.strict["planted"] == "2"
    assert backend.prepared == [4, 8]


def test_only_what_is_checked_is_compiled_ahead(plant, older, tmp_path, monkeypatch) -> None:
    requested = []
    monkeypatch.setattr(
        prefetch.Prefetcher, "_compile_more", lambda self, drawn: pytest.fail("compiles what a search would ask for")
    )

    def request(self, layer, regime, rows, tactics):
        requested.append(tactics)

    monkeypatch.setattr("moetune.measure.compiling.Compilers.request", request)
    monkeypatch.setattr(PlantedBackend, "likely", lambda self, problem, candidates: candidates.tactics)
    plant(milliseconds=MANY)
    tune_planted(store=tmp_path / "store", start="near")
    assert requested == [(tactic("default"), tactic("old"))] * 2


def test_what_contradicts_a_start_is_refused(plant, older, tmp_path) -> None:
    plant(milliseconds=MANY)
    with pytest.raises(UsageError, match="--frozen never measures"):
        tune_planted(start=older, frozen=True)
    with pytest.raises(UsageError, match="--strategy exhaustive measures all"):
        tune_planted(start=older, strategy="exhaustive")
    with pytest.raises(UsageError, match="cannot start a tune"):
        tune_planted(start=older.model_copy(update={"backend": "torch"}))
    with pytest.raises(UsageError, match="cannot start a tune"):
        tune_planted(start=older.model_copy(update={"choices": ()}))
    with pytest.raises(UsageError, match="There is no profile"):
        tune_planted(start=tmp_path / "none.json")
    with pytest.raises(MissError, match="is empty") as missed:
        tune_planted(store=tmp_path / "other", start="near")
    assert "--start" in missed.value.hint


def test_a_profile_of_another_deployment_can_start_if_it_is_given(plant, older, tmp_path) -> None:
    plant(milliseconds=MANY)
    regime = Regime(ep_size=4, attention_dp=True, ladder="2,64", draws=4)
    profile = tune_planted(regime, store=tmp_path / "store", start=older)
    assert [(choice.rows, choice.tactic, choice.tried) for choice in profile.choices] == [
        (2, tactic("old"), 2),
        (64, tactic("old"), 2),
    ]
