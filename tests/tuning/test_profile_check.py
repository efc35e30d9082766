"""A check compares a profile's choices with the default and with a new search, and stores nothing."""

from __future__ import annotations

import re

import pytest
from planted import PlantedBackend, tactic
from runs import REGIME, tune_planted

from moetune.errors import UsageError
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.tuning.check import check, undecided
from moetune.tuning.events import BucketChecked, Event

GOOD = {"default": 1.0, "good": 0.5, "slow": 2.0}


@pytest.fixture
def profile(plant, tmp_path) -> Profile:
    plant(milliseconds=GOOD)
    return tune_planted(store=tmp_path / "store")


def checked(profile: Profile, backend: PlantedBackend, **options):
    return check(profile, backend=backend, device="cpu", isolate=False, **options)


@pytest.mark.parametrize("time", range(10))
def test_a_good_profile_holds_every_time(plant, profile, time) -> None:
    result = checked(profile, plant(milliseconds=GOOD))
    assert [bucket.finding for bucket in result.buckets] == ["holds", "holds"]
    assert [bucket.rows for bucket in result.buckets] == [4, 8]
    for bucket in result.buckets:
        assert bucket.rival == bucket.tactic == tactic("good")
        assert [each.lag for each in bucket.by_rows] == [1.0]
        assert bucket.by_rows[0].gain == pytest.approx(2.0, rel=0.05)
        assert (bucket.cliff_at, bucket.reason) == (None, "")
    assert undecided(result) is None


def test_a_choice_that_a_new_search_beats_is_named_with_the_tactic_and_by_how_much(plant, profile) -> None:
    result = checked(profile, plant(milliseconds={**GOOD, "new": 0.4}))
    for bucket in result.buckets:
        assert bucket.finding == "beaten"
        assert bucket.rival == tactic("new")
        assert bucket.by_rows[0].lag == pytest.approx(1.25, rel=0.05)
        assert bucket.by_rows[0].lag_low > 1.02
        assert re.fullmatch(rf"slower than another tactic by 2[45]\.\d % at {bucket.rows} rows", bucket.reason)


def test_what_is_allowed_is_no_finding(plant, profile) -> None:
    backend = plant(milliseconds={**GOOD, "new": 0.4})
    assert not checked(profile, backend, within=0.5).of("beaten")


def test_a_choice_that_is_slower_than_the_default_is_found_though_the_default_is_the_best(plant, profile) -> None:
    result = checked(profile, plant(milliseconds={**GOOD, "default": 0.4}))
    assert {bucket.finding for bucket in result.buckets} == {"slower"}
    assert re.fullmatch(r"slower than the default by 2[45]\.\d % at 4 rows", result.buckets[0].reason)
    assert result.buckets[0].by_rows[0].gain_high < 1


def test_a_default_that_the_profile_kept_is_checked_like_any_choice(plant, tmp_path) -> None:
    plant(milliseconds={"default": 1.0, "slow": 2.0})
    kept = tune_planted(store=tmp_path / "kept")
    assert not checked(kept, plant(milliseconds={"default": 1.0, "slow": 2.0})).of("beaten", "slower")
    assert len(checked(kept, plant(milliseconds=GOOD)).of("beaten")) == 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"milliseconds": {"default": 1.0}}, "this device cannot run it"),
        ({"raising": frozenset({"good"})}, "planted failure"),
        ({"wrong": frozenset({"good"})}, "relative error"),
    ],
)
def test_a_choice_that_does_not_run_or_is_wrong_has_failed_and_the_others_go_on(
    plant, profile, changed, reason
) -> None:
    result = checked(profile, plant(**{"milliseconds": GOOD, **changed}))
    assert [bucket.finding for bucket in result.buckets] == ["failed", "failed"]
    assert reason in result.buckets[0].reason
    assert result.buckets[0].by_rows == ()
    assert result.buckets[0].rival is None


def test_a_default_that_fails_in_one_bucket_costs_that_bucket_alone(plant, profile, monkeypatch) -> None:
    def default(self, layer, regime, rows):
        return tactic("slow" if rows == 4 else "default")

    monkeypatch.setattr(PlantedBackend, "default", default)
    result = checked(profile, plant(milliseconds=GOOD, raising=frozenset({"slow"})))
    assert [bucket.finding for bucket in result.buckets] == ["failed", "holds"]
    assert result.buckets[0].reason.startswith("The default tactic")


def test_a_choice_with_a_cliff_is_still_compared_and_the_factor_is_named(plant, profile) -> None:
    result = checked(profile, plant(milliseconds=GOOD, cliff=frozenset({"good"})))
    assert [bucket.cliff_at for bucket in result.buckets] == [2, 2]
    assert all(bucket.by_rows for bucket in result.buckets)
    assert all(bucket.rival != tactic("good") for bucket in result.buckets)


def test_of_two_tactics_that_are_each_faster_somewhere_the_choice_holds(plant, tmp_path) -> None:
    """The bucket 8 serves 5 to 8 rows. The rival gains 10 % at 8 rows and loses 20 % at 5."""
    regime = Regime(ep_size=2, attention_dp=True, ladder="hybrid", draws=4, tune_max_num_tokens=8)
    uneven = {("other", 8): 0.45, ("other", 5): 0.6}
    plant(milliseconds=GOOD)
    profile = tune_planted(regime, store=tmp_path / "uneven")
    backend = plant(milliseconds={**GOOD, "other": 0.5}, milliseconds_at=uneven)
    (bucket,) = checked(profile, backend, buckets=[8]).buckets
    assert bucket.finding == "holds"
    assert {each.rows for each in bucket.by_rows} == {5, 7, 8}
    (bucket,) = checked(profile, plant(milliseconds={**GOOD, "other": 0.45}), buckets=[8]).buckets
    assert bucket.finding == "beaten"


def test_other_distributions_are_checked_too(plant, profile) -> None:
    result = checked(profile, plant(milliseconds=GOOD), under=["balanced", "zipf:1"])
    assert [(bucket.distribution, bucket.rows) for bucket in result.buckets] == [
        (distribution, rows) for distribution in ("random", "balanced", "zipf:1") for rows in (4, 8)
    ]
    assert result.regime == REGIME


def test_events_name_each_bucket_once(plant, profile) -> None:
    events: list[Event] = []
    result = checked(profile, plant(milliseconds=GOOD), on_event=events.append)
    found = [event for event in events if isinstance(event, BucketChecked)]
    assert [event.checked for event in found] == list(result.buckets)
    assert [(event.index, event.count) for event in found] == [(0, 2), (1, 2)]


def test_bad_questions_are_refused_before_anything_is_measured(plant, profile) -> None:
    backend = plant(milliseconds=GOOD)
    elsewhere = profile.environment.model_copy(update={"device": "NVIDIA H200"})
    for changed, options, message in (
        ({}, {"within": -0.1}, "--within must be 0 % or more"),
        ({}, {"buckets": [16]}, "no bucket of 16 rows"),
        ({}, {"under": ["uneven"]}, "uneven"),
        ({"choices": ()}, {}, "no choice to check"),
        ({"environment": elsewhere}, {}, "was measured on 'NVIDIA H200'"),
    ):
        with pytest.raises(UsageError, match=message):
            checked(profile.model_copy(update=changed), backend, **options)
    assert backend.prepared == []


def test_a_machine_that_is_too_noisy_decides_nothing_and_says_so(plant, profile, monkeypatch) -> None:
    monkeypatch.setattr("moetune.tuning.final_comparison.noise_floor", lambda *pairs: 0.3)
    result = checked(profile, plant(milliseconds={**GOOD, "new": 0.1}))
    assert {bucket.finding for bucket in result.buckets} == {"noisy"}
    error = undecided(result)
    assert error is not None
    assert "at 4, 8 rows" in error.message
