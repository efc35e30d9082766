"""What commands say of a packaged profile on a host with other versions."""

from __future__ import annotations

import importlib
import json

import pytest
from hosts import simulate

from moetune.errors import NoResultError
from moetune.spec.tactic import Tactic
from moetune.store.folders import packaged_root
from moetune.store.store import Store

QUESTION = ("--model", "qwen3-30b-a3b", "--ep", "4", "--dispatch", "none", "--backend", "triton")
NEUTRAL = {"torch": {"wanted": "2.14.0+cu130", "stored": "2.11.0+cu130"}}
NEAR = {"triton": {"wanted": "3.8.0", "stored": "3.6.0"}}
PLAIN = Tactic(
    {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
)
NEUTRAL_LINE = "easured with torch 2.11.0+cu130 (here 2.14.0+cu130); torch does not change what this kernel runs"
NEAR_LINE = "ear: measured with triton 3.6.0 (here 3.8.0); other tactics may be fastest here"


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Simulates a host with the given Triton, and returns the words of the question."""
    monkeypatch.setenv("MOETUNE_PACKAGED_PROFILES", "1")
    assert packaged_root() is not None

    def with_triton(version):
        simulate(monkeypatch, torch_version="2.14.0+cu130", cuda="13.0", triton=version)
        return (*QUESTION, "--store", tmp_path / "store")

    return with_triton


def text_of(result):
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


def test_a_profile_of_another_torch_is_shown_tuned_and_exported_with_one_line_about_it(moetune, host, tmp_path):
    question = host("3.6.0")
    for command in (["show"], ["tune", "--frozen"], ["tune"]):
        text = text_of(moetune(*command, *question))
        assert f"m{NEUTRAL_LINE}" in text
        assert "may be fastest" not in text
        document = json.loads(moetune(*command, *question, "--json").stdout)
        assert (document["near"], document["neutral"]) == ({}, NEUTRAL)
    assert "served from the profiles that come with moetune, nothing was measured" in text_of(
        moetune("tune", *question)
    )
    exported = moetune("export", *question, "--to", "vllm", "--out", tmp_path / "out")
    assert f"note: m{NEUTRAL_LINE}." in exported.stderr.splitlines()


def test_without_near_a_profile_of_another_triton_is_a_miss_that_names_near(moetune, host, tmp_path):
    question = host("3.8.0")
    for command in (["show"], ["tune", "--frozen"], ["export", "--to", "vllm", "--out", tmp_path / "out"]):
        missed = moetune(*command, *question)
        assert missed.exit_code == 3
        error, hint, view = missed.stderr.splitlines()[-3:]
        assert error.endswith("The nearest has triton 3.6.0 instead of 3.8.0.")
        assert "--near" in hint
        assert view.startswith("View the nearest: moetune show ")


def test_with_near_it_is_served_and_every_output_names_the_field(moetune, host, tmp_path):
    question = (*host("3.8.0"), "--near")
    for command in (["show"], ["tune", "--frozen"]):
        text = text_of(moetune(*command, *question))
        assert f"n{NEAR_LINE}" in text
        assert f"m{NEUTRAL_LINE}" in text
        document = json.loads(moetune(*command, *question, "--json").stdout)
        assert (document["near"], document["neutral"]) == (NEAR, NEUTRAL)
    words = ("export", *question, "--to", "vllm", "--out", tmp_path / "out")
    exported = moetune(*words)
    assert exported.exit_code == 0
    assert f"warning: n{NEAR_LINE}." in exported.stderr.splitlines()
    (provenance,) = (tmp_path / "out").rglob("*.moetune.json")
    assert f"n{NEAR_LINE}." in json.loads(provenance.read_text())["warnings"]
    document = json.loads(moetune(*words, "--json").stdout)
    assert (document["near"], document["neutral"]) == (NEAR, NEUTRAL)


def test_plan_names_the_near_profile_and_with_near_it_answers(moetune, host, monkeypatch):
    from moetune.backends.grouped_triton.backend import TritonBackend

    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: ("a simulated GPU", "Look no further."))
    question = host("3.8.0")
    assert (
        "profile: none for these versions. The nearest comes with moetune; it was measured with triton 3.6.0 "
        "(here 3.8.0)."
    ) in text_of(moetune("plan", *question))
    profile = json.loads(moetune("plan", *question, "--json").stdout)["profile"]
    assert (profile["differing"].keys(), profile["near"], profile["neutral"]) == ({"torch", "triton"}, NEAR, NEUTRAL)

    text = text_of(moetune("plan", *question, "--near"))
    assert f"profile: one that comes with moetune answers this question. N{NEAR_LINE}. M{NEUTRAL_LINE}." in text
    document = json.loads(moetune("plan", *question, "--near", "--json").stdout)
    assert (document["profile"]["differing"], document["profile"]["near"]) == ({}, NEAR)
    assert document["next_command"].startswith("moetune show ")


def test_near_needs_a_look_up(moetune, host):
    question = host("3.8.0")
    assert "Add --frozen" in moetune("tune", *question, "--near").stderr
    (path, *_) = packaged_root().rglob("*.json")
    refused = moetune("show", path, "--near")
    assert refused.exit_code == 2
    assert "needs no look-up" in refused.stderr


def test_a_plan_leads_to_the_check_of_the_near_profile(moetune, host, monkeypatch):
    from moetune.backends.grouped_triton.backend import TritonBackend

    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: ("a simulated GPU", "Look no further."))
    command = json.loads(moetune("plan", *host("3.8.0"), "--json").stdout)["next_command"]
    assert command.startswith("moetune tune --model qwen3-30b-a3b ")
    assert command.endswith(" --start near")


def test_start_takes_the_backend_of_its_profile_and_names_it_if_it_cannot_run(moetune, host, monkeypatch):
    tune = importlib.import_module("moetune.tuning.tune")
    asked = []

    def answer(layer, regime, *, backend, start, **options):
        asked.append((backend.name, start))
        raise NoResultError("no GPU")

    monkeypatch.setattr(tune, "tune", answer)
    words = [word for word in host("3.8.0") if word not in ("--backend", "triton")]
    (path, *_) = packaged_root().rglob("*.json")
    for start in ("near", path):
        assert moetune("tune", *words, "--start", start).exit_code == 1
    assert asked == [("triton", "near"), ("triton", str(path))]
    monkeypatch.setattr("moetune.cli.stored.backends_of", lambda request: [])
    refused = moetune("tune", *words, "--start", path)
    assert refused.exit_code == 2
    assert "is a profile of triton, which cannot run here" in refused.stderr


def of_vllm(model):
    return ("--model", model, "--ep", "8", "--dispatch", "vllm:allgather_reducescatter")


@pytest.mark.parametrize(
    ("model", "differs", "option"),
    [
        ("deepseek-r1", {"kernel_version": "0.19", "remote": "zero"}, "--backend-option kernel_version=0.20.2"),
        ("qwen3-30b-a3b", {"remote": "zero"}, "--remote zero"),
    ],
)
@pytest.mark.parametrize("backend", [(), ("--backend", "triton")], ids=["auto", "triton"])
def test_an_export_by_options_looks_up_the_kernel_of_its_version(
    moetune, host, tmp_path, model, differs, option, backend
):
    host("3.6.0")
    files = ("--store", tmp_path / "store", "--out", tmp_path / "out")
    words = ("export", *of_vllm(model), *backend, "--to", "vllm", *files)
    newest = json.loads(moetune(*words, "--json").stdout)["profile"]

    missed = moetune(*words, "--for-version", "0.20.2")
    assert missed.exit_code == 3
    assert "remote drop instead of zero" in missed.stderr
    assert f"`moetune tune {option}` with the same options" in missed.stderr

    store = Store(tmp_path / "store")
    packaged = store.read(newest)
    strict = {**packaged.environment.strict, **differs}
    chosen = tuple(choice.model_copy(update={"tactic": PLAIN, "equally_fast": ()}) for choice in packaged.choices)
    environment = packaged.environment.model_copy(update={"strict": strict})
    older = store.save(packaged.model_copy(update={"environment": environment, "choices": chosen}))
    path = store.path(older.layer, older.regime, older.backend, older.environment)
    for version, expected in (("0.20.2", str(path)), ("0.33.0", newest)):
        found = json.loads(moetune(*words, "--for-version", version, "--json", "--force").stdout)
        assert found["profile"] == expected
        assert not [warning for warning in found["warnings"] if "prefers" not in warning]


def test_a_version_that_contradicts_the_chosen_kernel_or_that_was_not_read_is_refused_or_named(moetune, host, tmp_path):
    host("3.6.0")
    words = (
        "export",
        *of_vllm("deepseek-r1"),
        "--to",
        "vllm",
        "--out",
        tmp_path / "out",
        "--store",
        tmp_path / "store",
    )
    other = moetune(*words, "--for-version", "0.20.2", "--backend-option", "kernel_version=0.33")
    assert (other.exit_code, "vLLM 0.20.2 is not the one that was chosen: 0.33" in other.stderr) == (2, True)
    older = moetune(*words, "--for-version", "0.18.1")
    assert (older.exit_code, "--backend-option kernel_version=0.19`" in older.stderr) == (3, True)


LADDER_LINE = (
    "easured on the ladder vllm; `moetune tune --again` with the same options measures the row counts between too"
)


def test_a_profile_of_the_ladder_vllm_answers_with_adaptive_and_every_output_says_so(
    moetune, host, tmp_path, monkeypatch
):
    from moetune.backends.grouped_triton.backend import TritonBackend

    host("3.6.0")
    coarser = ("--model", "qwen3-30b-a3b", "--ep", "4", "--dispatch", "allgather", "--backend", "triton", "--ladder")
    coarser = (*coarser, "vllm", "--store", tmp_path / "store")
    question = ["adaptive" if word == "vllm" else word for word in coarser]
    for command in (["show"], ["tune", "--frozen"], ["tune"]):
        text = text_of(moetune(*command, *question))
        assert f"m{LADDER_LINE}" in text
        assert "ladder vllm (the batch sizes of vLLM's and SGLang's tuned files)" in text
        assert json.loads(moetune(*command, *question, "--json").stdout)["measured_ladder"] == "vllm"
        assert LADDER_LINE not in text_of(moetune(*command, *coarser))
        assert json.loads(moetune(*command, *coarser, "--json").stdout)["measured_ladder"] is None
    words = ("--to", "vllm", "--out", tmp_path / "out")
    exported = moetune("export", *question, *words)
    assert f"note: m{LADDER_LINE}." in exported.stderr.splitlines()
    (written,) = [path for path in (tmp_path / "out").rglob("E=*.json") if "moetune" not in path.name]
    configs = json.loads(written.read_text())
    assert len([key for key in configs if key.isdecimal()]) == 18
    assert json.loads(moetune("export", *question, *words, "--json").stdout)["measured_ladder"] == "vllm"

    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: ("a simulated GPU", "Look no further."))
    assert f"profile: one that comes with moetune answers this question. M{NEUTRAL_LINE}. M{LADDER_LINE}." in text_of(
        moetune("plan", *question)
    )
    document = json.loads(moetune("plan", *question, "--json").stdout)
    assert (document["profile"]["differing"], document["profile"]["measured_ladder"]) == ({}, "vllm")


def test_plan_and_show_look_up_the_kernel_that_a_tune_for_sglang_measures(moetune, host, monkeypatch, tmp_path):
    """The packaged profiles were measured with a kernel that skips non-local slots. SGLang's writes zeros for them."""
    from moetune.backends.grouped_triton.backend import TritonBackend

    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: ("a simulated GPU", "Look no further."))
    host("3.6.0")
    asked = ("--model", "deepseek-r1", "--ep", "8", "--dispatch", "sglang:none", "--store", tmp_path / "store")
    missed = moetune("show", *asked)
    assert missed.exit_code == 3
    assert "remote drop instead of zero" in missed.stderr
    nearest = json.loads(moetune("plan", *asked, "--json").stdout)["profile"]
    assert nearest["differing"]["remote"] == {"wanted": "zero", "stored": "drop"}

    store = Store(tmp_path / "store")
    packaged = store.read(nearest["path"])
    strict = {**packaged.environment.strict, "remote": "zero"}
    environment = packaged.environment.model_copy(update={"strict": strict})
    zero = store.save(packaged.model_copy(update={"environment": environment}))
    path = str(store.path(zero.layer, zero.regime, zero.backend, zero.environment))
    assert json.loads(moetune("show", *asked, "--json").stdout)["path"] == path
    answering = json.loads(moetune("plan", *asked, "--json").stdout)["profile"]
    assert (answering["path"], answering["differing"]) == (path, {})
