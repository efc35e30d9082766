"""A tune of a recording, and what works when its file is gone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from moetune.inputs.options import parse
from moetune.recordings import recording
from moetune.spec.regime import Regime
from moetune.store.reading import load_profile
from moetune.tuning.tune import load

IDS = numpy.stack([numpy.roll(numpy.arange(2), number) + number % 13 for number in range(90)]).reshape(3, 30, 2)


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    path = tmp_path / "traffic.npz"
    numpy.savez(path, topk_ids=IDS)
    return path


@pytest.fixture
def words(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_known", {})
    return ["--model", tiny(), "--backend", "torch", "--device", "cpu", "--ladder", "4", "--store", tmp_path / "store"]


def test_a_stored_profile_needs_no_recording_and_a_tune_says_what_is_missing(moetune, words, traffic, tmp_path):
    tuned = moetune("tune", *words, "--distribution", f"replay:{traffic}@2", "--json")
    assert tuned.exit_code == 0, tuned.stderr
    document = json.loads(tuned.stdout)
    assert document["recording"] == {"name": "traffic.npz", "tokens": 30, "layers": 1, "layer": 2, "weights": False}
    spelled = document["regime"]["distribution"]
    moved = tmp_path / "moved.npy"
    numpy.save(moved, IDS[2].astype(numpy.uint8))
    again = moetune("tune", *words, "--distribution", f"replay:{moved}", "--json")
    assert json.loads(again.stdout)["served"], "the key has the digest of the ids, not their path, format or layer"

    traffic.unlink()
    moved.unlink()
    recording._known.clear()
    for command in (["show"], ["tune", "--frozen"], ["tune"]):
        shown = moetune(*command, *words, "--distribution", spelled)
        assert shown.exit_code == 0, shown.stderr
        assert "recording traffic.npz: 30 tokens of layer 2, weights are random" in shown.stdout
    assert moetune("show", document["path"]).stdout.count("traffic.npz") == 1
    profile = load_profile(document["path"])
    assert profile.recording is not None
    assert load(profile.layer, profile.regime, "torch", store=words[-1], device="cpu") == profile

    other = moetune("tune", *words, "--distribution", spelled, "--seed", "1")
    assert other.exit_code == 2
    assert f"The recording of {spelled} is not at hand" in other.stderr
    gone = moetune("tune", *words, "--distribution", f"replay:{traffic}")
    assert gone.exit_code == 2
    assert "cannot be read" in gone.stderr
    assert "No such file" in gone.stderr


def test_if_ranks_differ_the_number_of_the_rank_is_needed_too(moetune, words, traffic):
    deployed = [*words, "--ep", "4", "--dispatch", "allgather"]
    tuned = moetune("tune", *deployed, "--distribution", f"replay:{traffic}", "--rank", "fullest", "--json")
    assert tuned.exit_code == 0, tuned.stderr
    regime = json.loads(tuned.stdout)["regime"]
    recording._known.clear()
    without = moetune("show", *deployed, "--distribution", regime["distribution"])
    assert without.exit_code == 2
    assert "--rank R" in without.stderr
    rank = str(regime.get("rank", 0))
    assert moetune("show", *deployed, "--distribution", regime["distribution"], "--rank", rank).exit_code == 0


def test_a_plan_shows_the_recording_and_its_skew(moetune, words, traffic):
    planned = moetune("plan", *words, "--ep", "4", "--dispatch", "allgather", "--distribution", f"replay:{traffic}")
    assert planned.exit_code == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "recording traffic.npz: 90 tokens of 3 layers, weights are random" in text
    assert "numbers are means over the recorded tokens: " in text
    loads = numpy.bincount(IDS.flatten(), minlength=16) / IDS.size
    skew = f"recorded {1 / (loads**2).sum():.4g} effective experts of 16, busiest {16 * loads.max():.3g} × the mean"
    assert f"skew over all experts: {skew}" in text
    document = json.loads(moetune("plan", *words, "--distribution", f"replay:{traffic}", "--json").stdout)
    assert document["recording"]["tokens"] == 90
    assert document["skew"]["asked_effective_experts"] == document["skew"]["effective_experts"]
    assert "warning" not in planned.stderr


def test_a_recording_of_another_model_is_an_error(moetune, words, traffic):
    refused = moetune("plan", *words, "--top-k", "3", "--distribution", f"replay:{traffic}")
    assert refused.exit_code == 2
    assert "has 2 experts a token" in refused.stderr


def test_strict_skew_asks_nothing_of_a_recording(moetune, words, traffic):
    planned = moetune("plan", *words, "--strict-skew", "--distribution", f"replay:{traffic}")
    assert planned.exit_code == 0, planned.stderr


def test_the_variable_of_the_plugins_takes_a_path_with_blanks(tmp_path):
    asked = parse("--model qwen3-30b-a3b --distribution 'replay:/a b/c.npz@3'")
    assert asked.regime == Regime(distribution="replay:/a b/c.npz@3")


def test_a_check_under_a_recording_reads_it_once(moetune, words, traffic):
    tuned = moetune("tune", *words, "--json")
    checked = moetune(
        "check", json.loads(tuned.stdout)["path"], "--under", f"replay:{traffic}", "--device", "cpu", "--json"
    )
    assert checked.exit_code in (0, 4), checked.stderr
    found = {bucket["distribution"] for bucket in json.loads(checked.stdout)["buckets"]}
    assert found == {"random", *(f"replay:{digest}" for digest in recording._known)}
