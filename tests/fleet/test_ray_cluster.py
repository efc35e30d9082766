"""The fleet workers as Ray's actors, without Ray: where they start, how they are lost, and how it ends."""

import signal
import socket
import sys

import pytest
from choices import make_choice
from planted_cluster import H100
from planted_ray import PlantedRay, RayError, Ref, Stream

from moetune import __version__
from moetune.errors import UnsupportedError, UsageError
from moetune.fleet.cluster import Description, Ended, Lost, Message
from moetune.fleet.ray_cluster import REPLACED, RayCluster

DIED = "The actor died.\n\tclass_name: RayWorker\nThe actor is dead because its worker process has died. Worker exit …"


def said(number):
    return Ref(Description(f"worker {number}", number, "cuda", __version__, (H100,)))


@pytest.fixture
def planted(monkeypatch):
    def _planted(**given):
        ray = PlantedRay(**given)
        ray.install(monkeypatch)
        return ray

    return _planted


def test_each_free_gpu_gets_a_worker(planted):
    ray = planted(gpus=4, free=2, described=[said(1), said(2)])
    with RayCluster("local") as cluster:
        assert list(cluster.describe([])) == [1, 2]
        assert ray.options == [{"num_gpus": 1, "num_cpus": 0}] * 2
        assert cluster.receive() is None
    assert ray.initialized[0]["address"] == "local"
    assert ray.initialized[0]["include_dashboard"] is False
    assert ray.initialized[1:] == [{}], "shut down once"
    assert len(ray.killed) == 2


def test_without_gpus_each_machine_gets_one_worker_for_all_its_cores(planted):
    ray = planted(machines=2, described=[said(1), said(2)])
    with RayCluster("auto") as cluster:
        cluster.describe([])
    wanted = [{"num_cpus": 4.0, "scheduling_strategy": (f"node{n}", False)} for n in range(2)]
    assert ray.options == wanted
    assert "num_gpus" not in ray.initialized[0], "a running cluster has what it has"


def test_gpus_that_are_all_in_use_are_an_error(planted):
    planted(gpus=4)
    with (
        RayCluster("auto") as cluster,
        pytest.raises(UnsupportedError, match="All 4 GPUs of the Ray cluster are in use"),
    ):
        cluster.describe([])


def test_workers_that_cannot_start_are_left_out_and_without_any_there_is_an_error(planted):
    error = RayError("Traceback …\nModuleNotFoundError: No module named 'moetune'")
    planted(gpus=2, free=2, described=[Ref(error), said(2), Ref(error), Ref(error)])
    with RayCluster("auto") as cluster:
        assert list(cluster.describe([])) == [2]
    planted(gpus=1, free=1, described=[Ref(error)] * REPLACED)
    with RayCluster("auto") as cluster, pytest.raises(UnsupportedError, match="No module named 'moetune'"):
        cluster.describe([])
    planted(gpus=1, free=1, described=[Ref(None, ready=False)])
    with RayCluster("auto") as cluster, pytest.raises(UnsupportedError, match="none was ready after 120 s"):
        cluster.describe([])


def test_reports_come_as_messages_until_the_order_ends(planted):
    choice = make_choice(4)
    planted(gpus=1, free=1, described=[said(1)], reports=[Stream(iter([choice, Ended()]))])
    with RayCluster("auto") as cluster:
        cluster.describe([])
        cluster.start(1, None)
        assert [cluster.receive() for _ in range(3)] == [Message(1, choice), Message(1, Ended()), None]


def test_a_lost_worker_is_replaced_so_often(planted):
    ray = planted(gpus=1, free=1, described=[said(n) for n in range(1, 9)])
    with RayCluster("auto") as cluster:
        cluster.describe([])
        for worker in range(1, REPLACED + 1):
            ray.reports.append(Stream(iter([RayError(DIED)])))
            cluster.start(worker, None)
            assert cluster.receive() == Message(worker, Lost("its worker process has died."))
            if worker < REPLACED:
                joined = cluster.receive()
                assert (joined.worker, joined.content.name) == (worker + 1, f"worker {worker + 1}")
        assert cluster.receive() is None
    assert len(ray.options) == REPLACED


def test_a_replacement_that_finds_no_place_is_not_waited_for_for_ever(planted):
    planted(gpus=1, free=1, described=[said(1), Ref(None, ready=False)], reports=[Stream(iter([RayError(DIED)]))])
    with RayCluster("auto") as cluster:
        cluster.describe([])
        cluster.start(1, None)
        assert isinstance(cluster.receive().content, Lost)
        assert cluster.receive() is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "RayError."),
        ("first\nlast line.", "last line."),
        (DIED, "its worker process has died."),
        ("The actor 1f is unavailable: …", "its process or its machine does not answer."),
    ],
)
def test_the_reason_of_a_loss_is_one_sentence(planted, text, reason):
    planted(gpus=1, free=1, described=[said(1), said(2)], reports=[Stream(iter([RayError(text)]))])
    with RayCluster("auto") as cluster:
        cluster.describe([])
        cluster.start(1, None)
        assert cluster.receive().content == Lost(reason)


def test_signal_handlers_stay_as_they_are(planted, monkeypatch):
    ray = planted()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    init = ray.init

    def replacing(**options):
        init(**options)
        signal.signal(signal.SIGTERM, lambda *_: None)

    monkeypatch.setattr(sys.modules["ray"], "init", replacing)
    with RayCluster("local"):
        assert {number: signal.getsignal(number) for number in before} == before


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="not installed") as error:
        RayCluster("local")
    assert "ray>=" in error.value.hint


@pytest.mark.parametrize("address", ["nonsense", ":6379", "127.0.0.1:six", "127.0.0.1:1", "ray://127.0.0.1:10001", ""])
def test_an_address_without_a_cluster_is_an_error_at_once(planted, address):
    ray = planted()
    with pytest.raises(UsageError, match="--ray"), RayCluster(address):
        pass
    assert not ray.initialized


def test_a_cluster_that_ray_cannot_join_is_an_error(planted):
    planted(refusal=ConnectionError("Could not find any running Ray instance."))
    with pytest.raises(UsageError, match="Could not find any running Ray instance"), RayCluster("auto"):
        pass


def test_a_cluster_at_an_address_is_joined(planted):
    ray = planted()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with RayCluster(address):
            pass
    assert ray.initialized[0]["address"] == address
