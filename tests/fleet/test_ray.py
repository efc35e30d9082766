"""A local Ray of three workers: one is killed in the middle, and signals end a batch in order."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import ray_batching
from fleet_backend import TIMES, HangingBackend
from planted import LAYER
from planted_cluster import Told, regime
from processes import GIVE_UP_S, eventually

from moetune.fleet import ray_cluster
from moetune.fleet.fleet import Fleet
from moetune.fleet.ray_cluster import RayCluster
from moetune.fleet.run import run
from moetune.store.store import Store
from moetune.tuning import batch_run, final_comparison
from moetune.tuning.events import BucketChosen

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
pytestmark = pytest.mark.slow

QUESTIONS = range(1, 13)
TIMED = {
    "time_us", "default_time_us", "gain", "gain_low", "gain_high", "noise", "regret_high", "stress_us",
    "default_stress_us", "measured_at", "informative",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment_of_workers(monkeypatch, tmp_path):
    """Has Ray's processes import from where this one does, and Ray write its token into a folder of the test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
    monkeypatch.setattr(final_comparison, "SECONDS", 0.02)


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMED}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def content(folder):
    """The files of a store and what is in them, but for times."""
    return {
        str(path.relative_to(folder)): without_times(json.loads(path.read_text())) for path in folder.rglob("*.json")
    }


def kill(hung):
    """Kills the process that says in the file `hung` that it hangs."""
    assert eventually(hung.exists)
    os.kill(int(hung.read_text()), signal.SIGKILL)


def test_twelve_jobs_on_three_workers_of_which_one_is_killed_make_the_store_of_a_single_process(tmp_path, monkeypatch):
    backend, told = HangingBackend(TIMES, hung=tmp_path / "hung"), Told()
    killer = threading.Thread(target=kill, args=(backend.hung,), daemon=True)
    together = Store(tmp_path / "together", packaged=tmp_path / "none")
    monkeypatch.setattr(ray_cluster, "START_S", GIVE_UP_S)
    with RayCluster("local", local_gpus=3) as cluster:
        fleet = Fleet(cluster, [backend])
        assert len({worker.pid for worker in fleet.workers.values()} | {os.getpid()}) == 4
        questions = {n: fleet.questions(LAYER, regime("4,8", n), [backend], together)[0] for n in QUESTIONS}
        killer.start()
        run(questions, fleet, *told.listeners, isolate=False)
    assert backend.hung.exists()
    assert "is lost: its worker process has died. 1 bucket of question 5 will be tried elsewhere." in told.notes[0]
    assert {n: (answer.tuned, answer.failed) for n, answer in told.answers.items()} == dict.fromkeys(QUESTIONS, (2, ""))
    measured = Counter((n, event.choice.rows) for n, event in told.events if isinstance(event, BucketChosen))
    assert measured == Counter((n, rows) for n in QUESTIONS for rows in (4, 8))

    alone, answers = Store(tmp_path / "alone", packaged=tmp_path / "none"), []
    tasks = [batch_run.Task(n, LAYER, regime("4,8", n), backend, alone, isolate=False) for n in QUESTIONS]
    batch_run.run(tasks, ("cpu",), lambda *_: None, lambda *_: None, answers.append)
    assert not any(answer.failed for answer in answers)
    assert len(content(alone.root)) == 12
    assert content(together.root) == content(alone.root)


@pytest.fixture
def start(tmp_path):
    """Starts a batch of twelve jobs on a local Ray of three workers, in a process group of its own."""
    path = tmp_path / "jobs.json"
    deployments = [f"--seed {seed} --ep 4 --backend planted --ladder 4,8 --draws 1" for seed in QUESTIONS]
    path.write_text(json.dumps({"jobs": [{"model": "qwen3-30b-a3b", "options": deployments}]}))
    words = ["batch", path, "--ray", "local", "--store", tmp_path / "store", "--json"]
    processes = []

    def _start(**environment):
        process = subprocess.Popen(
            [sys.executable, ray_batching.__file__, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
            env={**os.environ, "MARK": str(tmp_path), **environment},
        )  # fmt: skip
        processes.append(process)
        return process

    yield _start
    for process in processes:
        process.kill()
        process.communicate()


def marked(folder):
    """The processes that were started with this folder's mark, Ray's own included."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={folder}\0".encode() in environ.read_bytes():
                found.append(environ.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_the_batch_and_all_of_ray_and_leaves_what_was_measured(start, tmp_path, number, to_group):
    process = start(BUCKET_S="2")
    assert eventually(lambda: list(tmp_path.glob("store/*/*/*/*.json")))
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=GIVE_UP_S)
    assert (process.returncode, out) == (128 + number, "")
    assert "Buckets that were finished are saved: " in err
    assert "Traceback" not in err
    assert eventually(lambda: not marked(tmp_path))
    saved = sum(path.read_text().count('"measured_at"') for path in tmp_path.glob("store/*/*/*/*.json"))
    assert 0 < saved < 24
    if to_group:
        return

    done = start()
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    document = json.loads(out)
    assert len(document["devices"]) == 3
    assert sum(question["tuned_buckets"] for question in document["questions"]) == 24 - saved
    assert {question["state"] for question in document["questions"]} <= {"tuned", "stored"}
