"""`moetune batch FILE --ray`, on planted clusters."""

import json
from contextlib import nullcontext

import pytest
from click.testing import CliRunner
from planted import PlantedBackend
from planted_cluster import H100, H200, PlantedCluster

from moetune.backends import registry
from moetune.cli.main import main
from moetune.fleet import ray_cluster
from moetune.spec.environment import Environment

SIZES = "--experts 8 --top-k 2 --hidden 64 --intermediate 32 --precision bf16"
OPTIONS = f"{SIZES} --ep 4 --backend planted --ladder 4,8"


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Runs a batch of jobs with these options on a planted cluster."""
    backend = PlantedBackend({"default": 1.0})
    real = registry.backend
    monkeypatch.setattr(
        registry, "backend", lambda name, **options: backend if name == "planted" else real(name, **options)
    )

    def _batch(cluster, *options, words=()):
        path = tmp_path / "jobs.json"
        path.write_text(json.dumps({"jobs": [{"options": list(options)}]}))
        monkeypatch.setattr(ray_cluster, "RayCluster", lambda address: nullcontext(cluster))
        given = ["batch", path, "--ray", "local", "--store", tmp_path / "store", *words]
        return CliRunner().invoke(main, list(map(str, given)))

    return _batch


def test_each_kind_of_gpu_has_questions_of_its_own(batch):
    result = batch(PlantedCluster([H100, H200, H200]), f"{OPTIONS} --seed 1", f"{OPTIONS} --seed 2", words=["--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["devices"] == ["worker 1", "worker 2", "worker 3"]
    assert [job["questions"] for job in document["jobs"]] == [[1, 2], [3, 4]]
    found = [(each["device"], each["state"], each["tuned_buckets"]) for each in document["questions"]]
    assert found == [("H100", "tuned", 2), ("H200", "tuned", 2)] * 2
    assert "[1/4]" in result.stderr
    assert "on worker 1" in result.stderr


def test_the_table_names_the_devices_if_there_are_several(batch):
    assert "H200" in batch(PlantedCluster([H100, H200]), OPTIONS).stdout
    assert "H200" not in batch(PlantedCluster([H200]), OPTIONS).stdout


def test_a_dry_run_measures_nothing_and_says_what_the_cluster_would(batch, tmp_path):
    cluster = PlantedCluster([H100, H100])
    result = batch(cluster, OPTIONS, words=["--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert not cluster.orders
    assert not (tmp_path / "store").exists()
    assert "1 question of 1 job: 2 buckets to tune" in result.stdout


def test_a_lost_worker_is_named_and_the_batch_goes_on(batch):
    result = batch(PlantedCluster([H100] * 2, lost_after={1: 1}), OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert "note: worker 1 is lost: its machine has gone." in result.stderr


def test_a_job_that_no_worker_can_run_fails_alone(batch):
    torch_only = f"{SIZES} --ep 4 --backend torch --ladder 4,8"
    cluster = PlantedCluster([H100])
    describe = cluster.describe

    def without_torch(backends):
        found = describe(backends)
        own = tuple("no torch" if backend.name == "torch" else H100 for backend in backends)
        cluster.description = lambda worker: type(found[1])("worker 1", 1, "cuda", found[1].version, own)
        return {1: cluster.description(1)}

    cluster.describe = without_torch
    result = batch(cluster, torch_only, OPTIONS)
    assert result.exit_code == 1
    assert "job 1 failed: No worker can run this. Backend torch: no torch." in result.stderr
    assert "1 of 2 jobs done" in result.stdout


def test_without_a_backend_each_that_a_worker_can_run_has_a_question(batch):
    result = batch(PlantedCluster([H100]), f"{SIZES} --ep 4 --ladder 4,8", words=["--json"])
    document = json.loads(result.stdout)
    asked = [question["backend"] for question in document["questions"]]
    assert set(asked) >= {"torch", "triton"}
    assert len(set(asked)) == len(asked) == len(document["jobs"][0]["questions"])


def test_a_cluster_of_cpus_and_workers_that_are_left_out_are_noted(batch, monkeypatch):
    cluster = PlantedCluster([Environment(device="EPYC", strict={}), H100], versions={2: "0.0.1"})
    monkeypatch.setattr(cluster, "description", _on_cpu(cluster.description))
    result = batch(cluster, OPTIONS)
    assert "warning: a worker is not used: worker 2 has moetune 0.0.1" in result.stderr
    assert "note: no machine of the cluster has a GPU" in result.stderr


def _on_cpu(description):
    return lambda worker: type(found := description(worker))(
        found.name, found.pid, "cpu", found.version, found.environments
    )


def test_a_device_and_a_cluster_exclude_each_other(batch):
    result = batch(PlantedCluster([H100]), OPTIONS, words=["--device", "cpu"])
    assert result.exit_code == 2
    assert "Give one of them." in result.stderr
