"""`moetune batch FILE`."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import batching
import pytest
from planted import PlantedBackend

from moetune.backends import registry
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning import batch_run
from moetune.tuning import final_comparison as final

MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-r1", "minimax-m2.5", "kimi-k2", "gpt-oss-120b")
DEPLOYMENTS = ("--ep 8 --dispatch vllm:allgather_reducescatter", "--ep 4", "--ep 8 --dp --layout deduplicated")
COMMON = "--backend planted --ladder 4,8 --draws 1"
FILE = {"jobs": [{"model": MODELS, "options": [f"{one} {COMMON}" for one in DEPLOYMENTS]}]}


@pytest.fixture
def planted(monkeypatch):
    """A backend `planted` with known times, in this process, and short finals."""
    backend = PlantedBackend(milliseconds={"default": 1.0, "fast": 0.1})
    real, run = registry.backend, batch_run.run
    monkeypatch.setattr(
        registry, "backend", lambda name, **options: backend if name == "planted" else real(name, **options)
    )
    monkeypatch.setattr(
        batch_run, "run", lambda tasks, *rest: run([replace(task, isolate=False) for task in tasks], *rest)
    )
    monkeypatch.setattr(final, "SECONDS", 0.02)
    return backend


@pytest.fixture
def batch(moetune, tmp_path, planted):
    """Runs a batch of these entries of `jobs` on the CPU."""

    def _batch(*jobs, words=()):
        path = tmp_path / "jobs.json"
        path.write_text(json.dumps({"jobs": jobs}))
        return moetune("batch", path, "--store", tmp_path / "store", "--device", "cpu", *words)

    return _batch


def _run(path, store, **environment):
    return subprocess.run(
        [sys.executable, batching.__file__, "batch", path, "--store", store, "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_six_models_by_three_deployments_are_complete_after_a_kill_in_the_middle(tmp_path):
    path, store = tmp_path / "jobs.json", tmp_path / "store"
    path.write_text(json.dumps(FILE))
    killed = _run(path, store, DIES_AT="20")
    assert killed.returncode == -9
    assert killed.stdout == ""
    before = {file: file.read_bytes() for file in store.rglob("*.json")}
    assert 0 < len(before) < 18

    done = _run(path, store)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["jobs"]) == len(document["questions"]) == 18
    states = [question["state"] for question in document["questions"]]
    whole = [file for file, content in before.items() if len(json.loads(content)["choices"]) == 2]
    assert states == ["stored"] * len(whole) + ["tuned"] * (18 - len(whole))
    profiles = [profile for _, profile in Store(store, packaged=tmp_path / "none").profiles()]
    assert len(profiles) == 18
    assert {profile.layer.name for profile in profiles} == set(MODELS)
    for profile in profiles:
        assert isinstance(profile, Profile)
        assert [(choice.rows, choice.tactic["algorithm"]) for choice in profile.choices] == [(4, "fast"), (8, "fast")]
    for file in whole:
        assert file.read_bytes() == before[file]
    assert not list(store.rglob("*.journal.jsonl"))


def test_equal_questions_of_several_jobs_are_tuned_once(batch, planted, tiny):
    entry = {"model": str(tiny()), "options": f"--ep 4 --dp {COMMON}"}
    result = batch(entry, {**entry, "options": f"--ep 2 --dp {COMMON}"}, entry)
    assert result.exit_code == 0, result.stderr
    assert "as above" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("3 of 3 jobs done")
    assert re.search(r"\[2/2\] 2 buckets tuned, \d", result.stderr)
    assert not result.stderr.endswith("\n\n")
    planted.prepared.clear()
    again = batch(entry, words=("--json",))
    assert not planted.prepared
    (question,) = json.loads(again.stdout)["questions"]
    assert (question["state"], question["stored_buckets"], question["tuned_buckets"]) == ("stored", 2, 0)


def test_a_job_that_fails_leaves_the_others_and_the_exit_code_is_1(batch, planted, tiny):
    good = {"model": str(tiny()), "options": f"--ep 4 --dp {COMMON}"}
    result = batch(
        {"model": "nonsense"},
        {**good, "options": f"--ep 4 --dp {COMMON} --device cpu"},
        {**good, "options": "--ep 4 --nonsense"},
        {"launch": "vllm serve Nobody/Nothing"},
        good,
        words=("--json",),
    )
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert [bool(job["failed"]) for job in document["jobs"]] == [True, True, True, True, False]
    assert "Unknown model 'nonsense'" in document["jobs"][0]["failed"]
    assert "Give --device to `moetune batch`" in document["jobs"][1]["failed"]
    assert "No such option" in document["jobs"][2]["failed"]
    assert [question["state"] for question in document["questions"]] == ["tuned"]
    assert "job 1 failed: Unknown model 'nonsense'" in result.stderr


def test_a_default_that_fails_is_a_failure_of_its_question(batch, planted, tiny):
    planted.wrong = frozenset({"default"})
    result = batch({"model": str(tiny()), "options": f"--ep 4 --dp {COMMON}"})
    assert result.exit_code == 1
    assert "question 1 failed: The default tactic" in result.stdout.replace("\n", " ")
    assert "0 of 1 job done" in result.stdout


def test_a_dry_run_measures_nothing(batch, planted, tiny, tmp_path):
    entry = {"model": str(tiny()), "options": [f"--ep 4 --dp {COMMON}", f"--ep 2 --dp {COMMON}"]}
    result = batch(entry, words=("--dry-run",))
    assert result.exit_code == 0, result.stderr
    assert not planted.prepared
    assert not (tmp_path / "store").exists()
    last = result.stdout.splitlines()[-1]
    assert last == "2 questions of 2 jobs: 4 buckets to tune; 2 questions without a recorded figure"
    document = json.loads(batch(entry, words=("--dry-run", "--json")).stdout)
    assert document["dry_run"] is True
    assert [question["state"] for question in document["questions"]] == ["planned", "planned"]
    assert batch({"model": "nonsense"}, words=("--dry-run",)).exit_code == 1


def test_without_a_backend_each_that_runs_here_has_a_question(batch, tiny, monkeypatch):
    backends = [PlantedBackend({"default": 1.0, "fast": 0.5}, name=name) for name in ("one", "other")]
    monkeypatch.setattr(registry, "preferred", lambda *_: backends[0])
    monkeypatch.setattr(registry, "able", lambda *_: (backends, {}))
    result = batch({"model": str(tiny()), "options": "--ep 4 --dp --ladder 4 --draws 1"}, words=("--json",))
    document = json.loads(result.stdout)
    assert document["jobs"][0]["questions"] == [1, 2]
    assert [question["backend"] for question in document["questions"]] == ["one", "other"]


def test_notes_are_said_once_with_the_first_job_that_has_them(batch, tiny):
    entry = {"model": str(tiny()), "options": [f"--ep 4 --dp {COMMON}", f"--ep 2 --dp {COMMON}"]}
    result = batch(entry, words=("--dry-run",))
    assert result.stderr.count("note: --dp alone means") == 1
    assert "job 1: note: --dp alone means" in result.stderr


def test_a_file_of_another_form_is_a_usage_error(moetune, tmp_path):
    path = Path(tmp_path / "jobs.yaml")
    path.write_text("jobs: 8")
    result = moetune("batch", path)
    assert result.exit_code == 2
    assert "one key jobs, a list" in result.stderr
