"""Which questions a fleet can answer: one for each environment, and never a mixture."""

import pytest
from planted import LAYER, PlantedBackend
from planted_cluster import BACKEND, H100, H200, PlantedCluster, questions_of, regime

from moetune import __version__
from moetune.errors import UnsupportedError
from moetune.fleet.fleet import Fleet, common
from moetune.store.store import Store


def test_each_environment_has_a_question_of_its_own(tmp_path):
    fleet = Fleet(PlantedCluster([H100, H200, H100]), [BACKEND])
    first, second = questions_of(fleet, tmp_path, "4,8").values()
    assert (first.environment.digest, second.environment.digest) == (H100.digest, H200.digest)
    assert [fleet.can_answer(fleet.workers[worker], first) for worker in (1, 2, 3)] == [True, False, True]
    assert fleet.names == ("worker 1", "worker 2", "worker 3")
    assert fleet.has_gpu


def test_a_backend_that_runs_on_some_workers_has_questions_of_these_alone(tmp_path):
    fleet = Fleet(PlantedCluster(["no GPU", H200]), [BACKEND])
    (question,) = questions_of(fleet, tmp_path, "4,8").values()
    assert question.environment.device == "H200"


def test_a_backend_that_runs_nowhere_is_refused_with_every_reason(tmp_path):
    fleet = Fleet(PlantedCluster(["no GPU", "no nvcc", "no GPU"]), [BACKEND])
    with pytest.raises(UnsupportedError, match="Backend planted: no GPU; planted: no nvcc"):
        fleet.questions(LAYER, regime("4"), [BACKEND], Store(tmp_path))
    assert not fleet.has_gpu


def test_workers_with_another_moetune_are_left_out():
    fleet = Fleet(PlantedCluster([H100, H100], versions={2: "0.0.1"}), [BACKEND])
    assert list(fleet.workers) == [1]
    assert fleet.left_out == (f"worker 2 has moetune 0.0.1, and this process has {__version__}.",)
    with pytest.raises(UnsupportedError, match="Install the same moetune"):
        Fleet(PlantedCluster([H100], versions={1: "0.0.1"}), [BACKEND])


def test_equal_backends_are_asked_about_once():
    cluster = PlantedCluster([H100])
    Fleet(cluster, [PlantedBackend({"default": 1.0}), PlantedBackend({"default": 1.0}), PlantedBackend({"b": 1.0})])
    assert cluster.count == 2


def test_a_profile_of_several_machines_names_only_what_they_agree_on():
    other = H100.model_copy(update={"informative": {"host": "b", "os": "linux"}})
    assert common([H100, other]).informative == {"os": "linux"}
    assert common([H100]).informative == H100.informative
    assert common([H100, other]).digest == H100.digest
