"""`moetune tune --backend auto`: one document, every profile, exit codes; and what `show` takes auto for."""

import importlib
import json
from functools import partial

import pytest
from planted import PlantedBackend

from moetune.backends import registry
from moetune.cli import backend_choice
from moetune.store.profile import Profile
from moetune.tuning import final_comparison as final
from moetune.tuning import side_by_side, tune_all
from moetune.tuning.comparison import Comparison

QUESTION = ("--ep", "4", "--dp", "--ladder", "4,8", "--draws", "1")


@pytest.fixture
def backends(monkeypatch):
    """Two backends in this process, in place of all, with short finals."""
    planted = [
        PlantedBackend({"default": 1.0, "best": us}, name=name) for name, us in (("triton", 0.6), ("torch", 0.1))
    ]
    named = {backend.name: backend for backend in planted}
    monkeypatch.setattr(registry, "backends", lambda: tuple(named))
    monkeypatch.setattr(registry, "backend", lambda name: named[name])
    monkeypatch.setattr(registry, "diagnosis", lambda name: registry.Diagnosis(name, True))
    for module in (final, side_by_side):
        monkeypatch.setattr(module, "SECONDS", 0.05)
    monkeypatch.setattr(tune_all, "tune_all", partial(tune_all.tune_all, isolate=False, device="cpu"))
    return named


@pytest.fixture
def question(tiny, backends):
    return ("--model", tiny(), *QUESTION)


@pytest.mark.parametrize("words", [(), ("--backend", "auto")], ids=["by default", "by name"])
def test_json_is_one_document_with_all_profiles_and_the_comparison(moetune, question, words):
    result = moetune("tune", *question, *words, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document)[:3] == ["schema_version", "layer", "regime"]
    comparison = Comparison.model_validate(document)
    assert [result.backend for result in comparison.families] == ["triton", "torch"]
    assert all(Profile.model_validate(result["profile"]).choices for result in document["families"])
    assert [(bucket.rows, bucket.winner) for bucket in comparison.buckets] == [(4, "torch"), (8, "torch")]


def test_the_progress_names_the_backend_and_the_tables_the_fastest_one_with_its_flag(moetune, question):
    result = moetune("tune", *question)
    assert "triton, 1 of 2 backends:" in result.stderr
    assert "torch, 2 of 2 backends:" in result.stderr
    assert result.stderr.count("[2/2] 8 rows") == 3
    assert "of 2 buckets: torch fastest in 2" in result.stdout
    assert "triton: vLLM --moe-backend triton" in result.stdout
    assert "torch: no flag of an engine selects it" in result.stdout
    assert result.stdout.count("profile: ") == 2


def test_a_backend_that_fails_is_reported_and_only_if_all_fail_is_the_exit_code_1(moetune, question, backends):
    backends["triton"].raising = frozenset({"default"})
    result = moetune("tune", *question)
    assert result.exit_code == 0
    assert "triton failed: The default tactic" in result.stderr
    assert "triton failed: The default tactic" in result.stdout
    backends["torch"].raising = frozenset({"default"})
    result = moetune("tune", *question, "--again")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: No backend has a result: triton: ")


def test_a_frozen_miss_of_all_backends_exits_3(moetune, question, backends):
    assert moetune("tune", *question, "--frozen").exit_code == 3
    assert moetune("tune", *question).exit_code == 0
    prepared = [len(backend.prepared) for backend in backends.values()]
    result = moetune("tune", *question, "--frozen")
    assert result.exit_code == 0
    assert "at 4, 8 rows the times come from separate runs" in result.stdout
    assert [len(backend.prepared) for backend in backends.values()] == prepared


def test_show_takes_auto_for_the_first_backend_that_has_a_profile(moetune, question, backends):
    missed = moetune("show", *question)
    assert missed.exit_code == 3
    assert "by triton" in missed.stderr
    moetune("tune", *question)
    assert "backend triton" in moetune("show", *question).stdout
    for path in (importlib.import_module("moetune.store.store").Store().root).glob("*/*/*/triton-*.json"):
        path.unlink()
    assert "backend torch" in moetune("show", *question).stdout


def test_auto_tunes_and_finds_the_kernel_of_the_engine(moetune, question, backends, monkeypatch):
    made = []

    def backend(name, **options):
        made.append((name, options))
        return backends[name]

    monkeypatch.setattr(registry, "backend", backend)
    monkeypatch.setattr(backend_choice, "option_types", lambda name: {"remote": str})
    words = (*question, "--dispatch", "sglang:none", "--draws", "1")
    assert moetune("tune", *words).exit_code == 0
    assert ("triton", {"remote": "zero"}) in made
    made.clear()
    assert "backend triton" in moetune("show", *words).stdout
    assert made.count(("triton", {"remote": "zero"})) == 1
