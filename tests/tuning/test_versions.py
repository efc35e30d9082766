"""Packaged profiles on hosts with other versions: torch's are neutral, Triton's are near."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts import simulate

from moetune.errors import MissError, UsageError
from moetune.spec.regime import Regime
from moetune.store.folders import packaged_root
from moetune.store.profile import Profile
from moetune.store.reading import load_profile
from moetune.store.store import Store
from moetune.tuning.events import Served
from moetune.tuning.question import Question
from moetune.tuning.tune import load, tune

PACKAGED = packaged_root()
assert PACKAGED is not None
PROFILES = [load_profile(path) for path in sorted(PACKAGED.rglob("*.json"))]
TORCH = [("2.11.0+cu130", "13.0"), ("2.12.1+cu129", "12.9"), ("2.13.0+cu130", "13.0"), ("2.14.0+cu132", "13.2")]


def question(profile: Profile, folder: Path, *, near: bool = False) -> Question:
    return Question.of(profile.layer, profile.regime, "triton", Store(folder, PACKAGED), "cuda", near=near)


@pytest.mark.parametrize(("torch_version", "cuda"), TORCH)
def test_every_packaged_profile_is_served_under_its_triton_with_any_torch(
    torch_version: str, cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, torch_version=torch_version, cuda=cuda, triton="3.6.0")
    for profile in PROFILES:
        match = question(profile, tmp_path).match()
        assert match.profile == profile
        assert match.near == {}
        changed = {"torch": (torch_version, "2.11.0+cu130"), "cuda": (cuda, "13.0")}
        assert match.neutral == {
            name: {"wanted": wanted, "stored": stored} for name, (wanted, stored) in changed.items() if wanted != stored
        }


@pytest.mark.no_cover
def test_every_packaged_profile_of_the_ladder_vllm_also_answers_with_adaptive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, torch_version="2.14.0+cu132", cuda="13.2", triton="3.6.0")
    of_vllm = [profile for profile in PROFILES if str(profile.regime.ladder) == "vllm"]
    assert len(of_vllm) > 10
    assert {profile.backend for profile in of_vllm} == {"triton"}
    for profile in of_vllm:
        regime = Regime(**{**profile.regime.model_dump(), "ladder": "adaptive"})
        asked = Question.of(profile.layer, regime, "triton", Store(tmp_path, PACKAGED), "cuda")
        match = asked.match()
        assert (match.profile, match.measured_ladder, match.near) == (profile, "vllm", {})
        assert match.neutral.keys() == {"torch", "cuda"}
        assert asked.found() == match
        assert asked.found(exact=True) is None
    events: list[object] = []
    for frozen in (True, False):
        store = Store(tmp_path, PACKAGED)
        assert tune(profile.layer, regime, "triton", store, frozen=frozen, device="cuda", on_event=events.append)
    assert [type(event) for event in events] == [Served, Served]


def test_tune_serves_it_and_says_in_what_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, torch_version="2.14.0+cu130", cuda="13.0", triton="3.6.0")
    profile, events = PROFILES[0], []
    asked = (profile.layer, profile.regime, "triton", Store(tmp_path, PACKAGED))
    for frozen in (True, False):
        assert tune(*asked, frozen=frozen, device="cuda", on_event=events.append) == profile
    for served in events:
        assert isinstance(served, Served)
        assert [each.field for each in served.differences] == ["torch"]
        assert served.packaged
    assert len(events) == 2


def test_under_another_triton_it_is_a_miss_unless_near_ones_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, torch_version="2.14.0+cu130", cuda="13.0", triton="3.8.0")
    for profile in PROFILES:
        with pytest.raises(MissError, match=r"triton 3\.6\.0 instead of 3\.8\.0") as missed:
            question(profile, tmp_path).load()
        assert missed.value.near
        assert {each.field for each in missed.value.differences} == {"torch", "triton"}
        match = question(profile, tmp_path, near=True).match()
        assert match.profile == profile
        assert match.path == missed.value.nearest
        assert match.near == {"triton": {"wanted": "3.8.0", "stored": "3.6.0"}}
        assert match.neutral == {"torch": {"wanted": "2.14.0+cu130", "stored": "2.11.0+cu130"}}
    asked = (PROFILES[0].layer, PROFILES[0].regime, "triton", Store(tmp_path, PACKAGED))
    assert load(*asked, device="cuda", near=True) == PROFILES[0]
    assert tune(*asked, device="cuda", frozen=True, near=True) == PROFILES[0]
    with pytest.raises(MissError, match="--near"):
        tune(*asked, device="cuda", frozen=True)
    with pytest.raises(UsageError, match="nothing is measured"):
        tune(*asked, device="cuda", near=True)


def test_a_profile_of_part_of_the_buckets_answers_only_in_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = PROFILES[0]

    def asked() -> Question:
        return Question.of(profile.layer, profile.regime, "triton", tmp_path, "cuda")

    part = Store(tmp_path).save(profile.model_copy(update={"choices": profile.choices[:3]}))
    simulate(monkeypatch, torch_version="2.11.0+cu130", cuda="13.0", triton="3.6.0")
    found = asked().found()
    assert found is not None
    assert found.profile == part
    simulate(monkeypatch, torch_version="2.14.0+cu130", cuda="13.0", triton="3.6.0")
    assert asked().found() is None
    assert asked().load() == part
    lacking = ", ".join(str(choice.rows) for choice in profile.choices[3:])
    with pytest.raises(MissError, match=f"lacks the buckets {lacking}"):
        tune(profile.layer, profile.regime, "triton", tmp_path, device="cuda", frozen=True)
