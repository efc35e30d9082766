import pickle

import pytest
import torch
from planted import LAYER, PlantedBackend, tactic

from moetune.backends.base import Backend, Problem
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.plain_torch.backend import TorchBackend
from moetune.errors import UnsupportedError
from moetune.measure.bench import Bench
from moetune.spec.regime import Regime
from moetune.tuning.joined import JoinedBackend, backend_of, joined
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

REGIME = Regime(draws=1)
PROBLEM = Problem(LAYER, REGIME, 4, REGIME.shard(LAYER), as_draws([realize(LAYER, REGIME, 4)] * 2), "cpu")
FAST, SLOW = joined("one", tactic("default")), joined("two", tactic("default"))


class Broken(PlantedBackend):
    def prepare(self, problem):
        raise MemoryError("no room for its weights")


def _both(second=PlantedBackend):
    return JoinedBackend((PlantedBackend({"default": 0.2}, name="one"), second({"default": 4.0, "b": 1.0}, name="two")))


def test_its_processes_load_the_modules_of_all_backends():
    joined = JoinedBackend((TorchBackend(), TritonBackend()))
    assert joined.modules == (*TorchBackend.modules, *TritonBackend.modules)


def test_it_is_a_backend_that_survives_a_pickle():
    again = pickle.loads(pickle.dumps(_both()))
    assert isinstance(again, Backend)
    assert again.unavailable() is again.unsupported(LAYER, REGIME) is None
    assert again.environment() == {"planted": "1"}
    assert again.tolerance(LAYER) == 1e-5


def test_candidates_are_those_of_all_backends_each_with_its_name():
    found = _both().candidates(LAYER, REGIME, 4, "cpu")
    assert found.tactics == (FAST, SLOW, joined("two", tactic("b")))
    assert {backend_of(excluded) for excluded in found.excluded} == {"one", "two"}
    assert _both().default(LAYER, REGIME, 4) == FAST


def test_each_tactic_is_run_by_its_own_backend():
    fast, slow = Bench(_both(), PROBLEM).samples((FAST, SLOW), [0] * 5)
    assert min(slow) > 4000 > 2000 > sorted(fast)[2]


def test_a_backend_that_cannot_be_prepared_fails_alone_and_says_why():
    bench = Bench(_both(Broken), PROBLEM)
    fast, slow = bench.samples((FAST, SLOW), [0, 0])
    assert len(fast) == 2
    assert slow is None
    assert "no room for its weights" in bench.failures[SLOW]


def test_there_is_no_reference_that_all_backends_share():
    runner = _both().prepare(PROBLEM)
    assert torch.equal(runner.run(FAST), torch.ones(4, LAYER.hidden_size))
    with pytest.raises(UnsupportedError, match="no shared reference"):
        runner.reference()
