from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import NoResultError, UsageError
from moetune.spec.ladder import Ladder
from moetune.spec.recording import RecordingSummary
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile


@st.composite
def regimes(draw: st.DrawFn) -> Regime:
    """Every ladder with any divisor and maximum, among them pools, which lack buckets."""
    maximum = draw(st.integers(64, 20_000))
    spelled = draw(st.sampled_from(["pow2", "hybrid", "vllm", "list"]))
    if spelled == "list":
        sizes = draw(st.sets(st.integers(1, maximum), min_size=1, max_size=12))
        spelled = ",".join(map(str, sorted(sizes)))
    divisor = draw(st.sampled_from([1, 1, 3, 8]))
    ep_size = draw(st.sampled_from([1, 2, 8]))
    layout = draw(st.sampled_from(["packed", "pool"]))
    try:
        return Regime(
            ep_size=ep_size, layout=layout, ladder=f"{spelled}/{divisor}", tune_max_num_tokens=maximum, seed=0
        )
    except UsageError:  # a pool without any bucket
        return Regime(ep_size=ep_size, layout="packed", ladder=f"{spelled}/{divisor}", tune_max_num_tokens=maximum)


def bucket_by_definition(regime: Regime, measured: list[int], rows: int) -> int:
    wanted = regime.ladder.lookup(rows, regime.tune_max_num_tokens)
    return next((size for size in measured if size >= wanted), measured[-1])


@settings(max_examples=120)
@given(data=st.data())
def test_look_up_follows_the_ladder_for_every_row_count(
    data: st.DataObject, profile_of: Callable[..., Profile]
) -> None:
    regime = data.draw(regimes())
    measured = sorted(data.draw(st.sets(st.sampled_from(regime.buckets), min_size=1)))
    profile = profile_of(regime, measured)
    top = regime.tune_max_num_tokens * regime.ladder.divisor
    near = {edge * regime.ladder.divisor + step for edge in regime.buckets for step in (-1, 0, 1)}
    middles = {(a + b) // 2 * regime.ladder.divisor for a, b in zip(regime.buckets, regime.buckets[1:], strict=False)}
    asked = {*near, *middles, 1, 2, top - 1, top, top + 1, *data.draw(st.lists(st.integers(1, 2 * top), max_size=40))}
    for rows in asked:
        if rows >= 1:
            expected = bucket_by_definition(regime, measured, rows)
            assert profile.choice(rows).rows == expected, rows
            assert profile.tactic(rows) == Tactic(tile=expected), rows


@pytest.mark.parametrize("ladder", ["pow2", "hybrid", "vllm", "pow2/4", "hybrid/3", "3,5,40,41,300"])
@pytest.mark.parametrize("maximum", [300, 700])
def test_look_up_follows_the_ladder_row_by_row(ladder: str, maximum: int, profile_of: Callable[..., Profile]) -> None:
    regime = Regime(ladder=ladder, tune_max_num_tokens=maximum)
    profile = profile_of(regime)
    for rows in range(1, 4 * maximum):
        assert profile.choice(rows).rows == bucket_by_definition(regime, list(regime.buckets), rows)


@pytest.mark.parametrize("ladder", ["pow2", "hybrid", "vllm", "2,6,16", "pow2/8"])
def test_rows_past_the_last_bucket_use_the_last_and_less_than_one_the_first(
    ladder: str, profile_of: Callable[..., Profile]
) -> None:
    profile = profile_of(Regime(ladder=ladder, tune_max_num_tokens=100))
    for rows in (10**4, 2**63, 10**30):
        assert profile.choice(rows) is profile.choices[-1]
    for rows in (0, -1, -(2**70)):
        assert profile.choice(rows) is profile.choices[0]


def test_rows_that_miss_in_flashinfer_use_the_smallest_larger_bucket(profile_of: Callable[..., Profile]) -> None:
    regime = Regime(ladder="hybrid", tune_max_num_tokens=100)
    assert regime.ladder.lookup(80, 100) not in regime.buckets
    assert profile_of(regime).choice(80).rows == 100


def test_rows_below_a_pools_first_bucket_use_it(profile_of: Callable[..., Profile]) -> None:
    regime = Regime(ep_size=8, layout="pool", tune_max_num_tokens=64)
    assert regime.skipped_buckets == (1, 2, 4)
    assert [profile_of(regime).choice(rows).rows for rows in (1, 7, 8, 15, 16)] == [8, 8, 8, 8, 16]


def test_partial_profile_answers_from_what_it_has(profile_of: Callable[..., Profile]) -> None:
    profile = profile_of(Regime(tune_max_num_tokens=64), [4, 16])
    assert [profile.choice(rows).rows for rows in (1, 4, 7, 8, 16, 64)] == [4, 4, 4, 16, 16, 16]


def test_empty_profile_has_no_answer(profile_of: Callable[..., Profile]) -> None:
    profile = profile_of(rows=[])
    for look_up in (profile.choice, profile.tactic):
        with pytest.raises(NoResultError, match="no choice"):
            look_up(1)


def test_only_the_first_look_up_asks_the_ladder(
    profile_of: Callable[..., Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profile_of(Regime(ladder="hybrid", tune_max_num_tokens=65536))
    first = profile.tactic(300)
    monkeypatch.setattr(Ladder, "lookup", lambda *arguments: pytest.fail("the ladder is asked again"))
    assert profile.tactic(300) == first == profile.choice(300).tactic


def test_copy_with_other_choices_looks_up_its_own(
    profile_of: Callable[..., Profile], choice_of: Callable[..., Choice]
) -> None:
    profile = profile_of()
    assert profile.tactic(4) == Tactic(tile=4)
    other = profile.model_copy(update={"choices": (choice_of(4, tactic={"tile": 99}),)})
    assert other.tactic(4) == Tactic(tile=99)
    assert profile.tactic(4) == Tactic(tile=4)


def test_profile_survives_json_pickle_and_copy_after_a_look_up(profile_of: Callable[..., Profile]) -> None:
    profile = profile_of(Regime(ep_size=8, layout="pool", ladder="pow2/2", tune_max_num_tokens=64))
    untouched = profile.model_dump_json()
    profile.tactic(16)
    assert profile.model_dump_json() == untouched
    for again in (
        Profile.model_validate_json(untouched),
        Profile.model_validate(json.loads(untouched)),
        pickle.loads(pickle.dumps(profile)),
        copy.deepcopy(profile),
    ):
        assert again == profile
        assert again.tactic(16) == profile.tactic(16)


def test_stress_time_of_a_tactic_that_failed_survives_json(
    choice_of: Callable[..., Choice], profile_of: Callable[..., Profile]
) -> None:
    choice = choice_of(1, stress_us={"4": float("inf")})
    text = choice.model_dump_json()
    assert json.loads(text, parse_constant=pytest.fail)["stress_us"] == {"4": "Infinity"}
    assert Choice.model_validate_json(text) == choice
    profile = profile_of(rows=[1]).model_copy(update={"choices": (choice,)})
    text = profile.model_dump_json()
    assert json.loads(text, parse_constant=pytest.fail)["choices"][0]["stress_us"] == {"4": "Infinity"}
    assert Profile.model_validate_json(text) == profile


@pytest.mark.parametrize("field", ["time_us", "default_time_us", "gain", "gain_low", "gain_high", "noise"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_choice_refuses_a_measurement_that_is_no_number(
    field: str, value: float, choice_of: Callable[..., Choice]
) -> None:
    with pytest.raises(UsageError, match=field):
        choice_of(1, **{field: value})


@pytest.mark.parametrize("measured_at", ["yesterday", "", "2026-01-01T00:00:00", "2026-01-01T00:00:00+02:00"])
def test_choice_refuses_a_time_that_is_not_utc(measured_at: str, choice_of: Callable[..., Choice]) -> None:
    with pytest.raises(UsageError, match="measured_at"):
        choice_of(1, measured_at=measured_at)


@pytest.mark.parametrize(("rows", "problem"), [([2, 1], "ascending"), ([1, 1], "distinct"), ([3], "buckets")])
def test_profile_refuses_choices_that_are_not_one_a_bucket(
    rows: list[int], problem: str, profile_of: Callable[..., Profile]
) -> None:
    with pytest.raises(UsageError, match=problem):
        profile_of(rows=rows)


STAMPS = st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:01+00:00"])


@settings(max_examples=60)
@given(
    older=st.dictionaries(st.sampled_from([1, 2, 4, 8]), STAMPS),
    newer=st.dictionaries(st.sampled_from([1, 2, 4, 8]), STAMPS),
)
def test_merge_keeps_every_bucket_with_its_later_measurement(
    older: dict[int, str],
    newer: dict[int, str],
    profile_of: Callable[..., Profile],
    choice_of: Callable[..., Choice],
) -> None:
    def profile(stamps: dict[int, str], tile: int) -> Profile:
        choices = [choice_of(rows, measured_at=stamps[rows], tactic={"tile": tile}) for rows in sorted(stamps)]
        return profile_of(choices=tuple(choices))

    def seconds(stamps: dict[int, str], rows: int) -> float:
        return profile(stamps, 0).choices[sorted(stamps).index(rows)].measured_time.timestamp()

    merged = profile(older, 1).merged(profile(newer, 2))
    expected: dict[int, Any] = {}
    for rows in sorted({*older, *newer}):
        old_wins = rows not in newer or (rows in older and seconds(older, rows) > seconds(newer, rows))
        expected[rows] = 1 if old_wins else 2
    assert {choice.rows: choice.tactic["tile"] for choice in merged.choices} == expected
    assert Profile.model_validate_json(merged.model_dump_json()) == merged
    replaced = profile(older, 1).merged(profile(newer, 2), replacing=True)
    tiles = {rows: 2 if rows in newer else 1 for rows in sorted({*older, *newer})}
    assert {choice.rows: choice.tactic["tile"] for choice in replaced.choices} == tiles


def test_reprs_are_short_and_the_gain_is_the_geometric_mean(profile_of, choice_of) -> None:
    choices = (choice_of(1, gain=1.0), choice_of(2, gain=4.0))
    found = profile_of(choices=choices)
    assert found.gain == pytest.approx(2.0)
    assert repr(found) == f"Profile(small, {found.regime.slug}, torch, 2 buckets, 2.00x)"
    assert str(choices[1]) == "Choice(2 rows, tile=2, 4.00x)"
    empty = profile_of(choices=())
    assert repr(empty) == f"Profile(small, {empty.regime.slug}, torch, 0 buckets)"
    with pytest.raises(NoResultError):
        _ = empty.gain


def test_a_profile_says_which_recording_it_is_of_and_names_it_by_its_digest_only(profile_of):
    profile = profile_of()
    assert "recording" not in profile.model_dump(mode="json")
    summary = RecordingSummary(name="traffic.npz", tokens=10, layers=2)
    regime = profile.regime.model_copy(update={"distribution": "replay:0123456789abcdef"})
    of_recording = profile.model_copy(update={"recording": summary, "regime": regime})
    assert Profile.model_validate_json(of_recording.model_dump_json()) == of_recording
    with pytest.raises(UsageError, match="names a recording by its digest"):
        Profile.model_validate({**of_recording.model_dump(), "regime": {"distribution": "replay:/etc/passwd"}})
