"""A backend that defines only the abstract methods is searched exhaustively and compiles nothing ahead."""

import importlib.util
import io
import pickle
import sys

import pytest
from planted import LAYER, PlantedBackend, tactic

from moetune.backends.base import Backend, Problem
from moetune.backends.registry import backend, backends
from moetune.measure.compiling import Compilers
from moetune.search.exhaustive import exhaustive
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

REGIME = Regime(draws=1)
PROBLEM = Problem(LAYER, REGIME, 4, REGIME.shard(LAYER), as_draws([realize(LAYER, REGIME, 4)]))
ABSTRACT = {"unavailable", "unsupported", "environment", "candidates", "default", "tolerance", "prepare"}


class Paced(PlantedBackend):
    final_s = 0.5


def _backend():
    return PlantedBackend({"default": 1.0, "b": 0.5})


def _finish(search, times):
    """Returns the batches of a search and its finalists."""
    batches = [next(search)]
    try:
        while True:
            batches.append(search.send({tried: times[tried] for tried in batches[-1].tactics}))
    except StopIteration as stop:
        return batches, stop.value


def test_a_class_that_lacks_an_abstract_method_cannot_be_made():
    assert Backend.__abstractmethods__ == ABSTRACT
    for lacking in ABSTRACT:
        methods = {name: getattr(PlantedBackend, name) for name in ABSTRACT - {lacking}}
        with pytest.raises(TypeError, match=lacking):
            type("Lacking", (Backend,), methods)()
    type("Whole", (Backend,), {name: getattr(PlantedBackend, name) for name in ABSTRACT})()


def test_by_default_every_tactic_is_timed_whatever_the_warm_starts_are():
    backend, times = _backend(), {tactic("default"): 1000.0, tactic("b"): 500.0}
    offered = backend.candidates(LAYER, REGIME, 4, "cpu")
    plain = _finish(exhaustive(offered.tactics), times)
    for warm_starts in ((), (tactic("b"),)):
        assert _finish(backend.search(PROBLEM, offered, warm_starts), times) == plain
    assert backend.promising(times) == ()


def test_by_default_nothing_is_compiled_ahead():
    backend = _backend()
    offered = backend.candidates(LAYER, REGIME, 4, "cpu")
    assert backend.likely(PROBLEM, offered) == ()
    assert backend.compile_keys(LAYER, REGIME, 4, tactic("b")) == ()
    with pytest.raises(NotImplementedError, match="planted"):
        backend.compile(LAYER, REGIME, 4, tactic("b"), 0, (9, 0))
    with Compilers(backend, (9, 0)) as compilers:
        compilers.request(LAYER, REGIME, 4, offered.tactics)
        assert compilers.wait(LAYER, REGIME, 4, offered.tactics) == {}
        assert compilers._thread is None


def test_a_process_loads_what_it_will_need_as_far_as_it_can_be_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    planted = _backend()
    planted.modules = ("moetune.no_such_module", "this")
    planted.load()
    assert "this" in sys.modules


@pytest.mark.parametrize("name", backends())
def test_the_modules_of_every_backend_exist(name):
    for module in backend(name).modules:
        assert importlib.util.find_spec(module) is not None


def test_the_tune_paces_the_final_comparison_unless_the_backend_says_how_long_it_takes():
    assert _backend().final_s is None
    assert pickle.loads(pickle.dumps(Paced({"default": 1.0}))).final_s == 0.5
