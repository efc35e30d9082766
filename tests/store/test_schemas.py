"""Every schema that was ever written is read, and its files are found under the keys that they had."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from moetune.report.profile import profile_report
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.journal import Journal
from moetune.store.key import Key
from moetune.store.profile import Choice, Profile
from moetune.store.reading import load_profile
from moetune.store.store import Store

SCHEMAS = Path(__file__).parents[1] / "data/schemas"
PROFILES = sorted(SCHEMAS.glob("profile-*.json"))
REGIME = "ep2-tp1-dp-alltoall-packed-random-f1cc67d63cb72193"
REGIMES = {"profile-61e32a8": "ep2-tp1-dp-alltoall-packed-zipf1-236eb26f169035de"}
"""The folders in which the files lay, where that is not `REGIME`."""


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_read_shown_found_under_its_key_and_written_again(path: Path, store: Store) -> None:
    profile = load_profile(path)
    assert [choice.rows for choice in profile.choices] == [1, 2]
    assert profile_report(profile, path)
    key = Key.of(profile)
    assert key.path.parts[1:3] == ("e8-k2-h16-i8-fp32-3a382efb217ad089", REGIMES.get(path.stem, REGIME))
    (store.root / key.path).parent.mkdir(parents=True)
    shutil.copy(path, store.root / key.path)
    assert store.load(*key) == profile
    assert store.save(profile) == profile
    assert load_profile(store.root / key.path) == profile


def test_the_profiles_have_every_field_that_a_choice_can_have() -> None:
    written = [choice for path in PROFILES for choice in json.loads(path.read_text())["choices"]]
    assert set().union(*written) == set(Choice.model_fields)
    assert set.intersection(*map(set, written)) < set(Choice.model_fields)
    assert {json.loads(path.read_text())["schema_version"] for path in PROFILES} == {
        Profile.model_fields["schema_version"].default
    }


@pytest.mark.parametrize(("name", "searches"), [("journal-3fd0d04", 0), ("journal-6b30651", 2)])
def test_a_journal_is_read(name: str, searches: int) -> None:
    found = Journal(SCHEMAS / f"{name}.jsonl", nullcontext).read()
    assert found.unread == ()
    assert [(each.tactic["algorithm"], each.time_us, bool(each.reason)) for each in found.measurements] == [
        ("eager", 52.25, False),
        ("grouped_mm", 61.5, False),
        ("dense", None, True),
    ]
    assert len(found.searches) == searches


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("provenance-*.json")), ids=lambda path: path.stem)
def test_the_provenance_of_a_file_has_the_layer_and_the_regime_that_it_was_measured_for(path: Path) -> None:
    origin = json.loads(path.read_text())
    digest = origin["regime"].pop("digest")
    assert Regime(**origin["regime"]).digest == digest
    assert MoELayer(**origin["layer"]).num_experts == 128
    assert origin["schema_version"] == 1
