"""`moetune compare A B`."""

import importlib
import json
from functools import partial

import pytest
from choices import make_choice
from planted import LAYER, PlantedBackend, tactic

from moetune.backends import registry
from moetune.measure.probe import environment
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.store.store import Store

TIMED = importlib.import_module("moetune.tuning.timed_changes")
REGIME = Regime(ep_size=2, attention_dp=True, ladder="4,8", draws=2)


@pytest.fixture
def backend(monkeypatch):
    planted = PlantedBackend({"default": 1.0, "fast": 0.5})
    real = registry.backend
    monkeypatch.setattr(
        registry, "backend", lambda name, **options: planted if name == "planted" else real(name, **options)
    )
    monkeypatch.setattr(TIMED, "SECONDS", 0.05)
    monkeypatch.setattr(TIMED, "timed", partial(TIMED.timed, isolate=False))
    return planted


@pytest.fixture
def saved(tmp_path, backend):
    """Saves a profile of the planted backend with one tactic in both buckets, and returns its file."""

    def _saved(name, **strict):
        here = environment(backend, "cpu")
        here = Environment(device=here.device, strict={**here.strict, **strict}, informative=here.informative)
        choices = [make_choice(rows, tactic=tactic(name)) for rows in (4, 8)]
        made = Profile(layer=LAYER, regime=REGIME, backend="planted", environment=here, choices=choices)
        store = Store(tmp_path / "store", packaged=tmp_path / "none")
        store.save(made, replacing=True)
        path = tmp_path / f"{name}.json"
        path.write_text(made.model_dump_json())
        return path

    return _saved


def test_a_profile_and_itself_are_equal(moetune, saved):
    path = saved("fast")
    result = moetune("compare", path, path)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "equal: the same tactic in all 2 buckets"
    document = json.loads(moetune("compare", path, path, "--json").stdout)
    assert document["equal"] is True
    assert document["schema_version"] == 1


def test_a_difference_is_no_failure(moetune, saved):
    result = moetune("compare", saved("default"), saved("fast"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("2 of 2 buckets have another tactic")


def test_both_are_timed_here(moetune, saved):
    result = moetune("compare", saved("default"), saved("fast"), "--measure", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == ["[1/2] 4 rows", "[2/2] 8 rows"]
    buckets = json.loads(result.stdout)["buckets"]
    assert [bucket["timed"][0]["faster"] for bucket in buckets] == ["b", "b"]
    assert buckets[0]["timed"][0]["ratio"] == pytest.approx(0.5, rel=0.01)


def test_versions_that_are_not_here_are_not_measured(moetune, saved):
    result = moetune("compare", saved("default", planted="0"), saved("fast"), "--measure", "--device", "cpu")
    assert result.exit_code == 2
    assert "profile A was measured with planted 0 (here 1)" in result.stderr


def test_near_is_the_stored_profile_of_other_versions(moetune, tmp_path):
    choices = [make_choice(rows) for rows in (4, 8)]
    store = Store(tmp_path / "store", packaged=tmp_path / "none")
    paths = []
    for version in ("3.6.0", "3.8.0"):
        here = Environment(device="GPU", strict={"triton": version})
        made = Profile(layer=LAYER, regime=REGIME, backend="triton", environment=here, choices=choices)
        store.save(made)
        paths.append(store.path(made.layer, made.regime, made.backend, made.environment))
    options = ("--store", tmp_path / "store")
    for words in (("near", paths[1]), (paths[0], "near")):
        result = moetune("compare", *words, *options)
        assert result.exit_code == 0, result.stderr
        assert "measured with: triton 3.6.0 in A, 3.8.0 in B" in result.stdout
    paths[0].unlink()
    result = moetune("compare", "near", paths[1], *options, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["miss"]["message"].startswith("No other stored profile")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("near", "near"), "A and B are both near"),
        (("none.json", "near"), "none.json"),
        (("a.json", "b.json", "--device", "cpu"), "Add --measure"),
    ],
)
def test_a_wrong_question_is_an_error(moetune, words, said):
    result = moetune("compare", *words)
    assert result.exit_code == 2
    assert said in result.stderr
