"""Marlin's kernel itself, from an installed vLLM, on a GPU."""

import pytest
import torch
from four_bit_layers import PRECISIONS, REGIMES, tiny
from graphs import replayed_error

from moetune.backends.base import Problem
from moetune.backends.marlin.activation import activate
from moetune.backends.marlin.backend import ACTIVATIONS, TOLERANCE, MarlinBackend
from moetune.backends.marlin.space import AUTO, tactic_of
from moetune.backends.reference import reference_activation, relative_error
from moetune.measure.worker import Worker
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def backend():
    made = MarlinBackend()
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    return made


@pytest.fixture(scope="module")
def worker(backend):
    """A process for what may hang: blocks that are not all resident would wait for each other forever."""
    with Worker(backend, "cuda") as made:
        yield made


def layer_of(precision, **others):
    return tiny(precision, num_experts=64, top_k=8, hidden_size=1024, intermediate_size=512, **others)


def problem_of(layer, regime, rows, draws=1):
    rank = regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), "cuda")


def prepared(backend, layer, regime, rows, draws=1):
    return backend.prepare(problem_of(layer, regime, rows, draws))


def lines(backend, layer, regime, rows):
    """Every block size with every tile of one GEMM, the other with the kernel's own."""
    tactics = backend.candidates(layer, regime, rows, "cuda").tactics
    return [tactic for tactic in tactics if AUTO in (tactic["gemm1"], tactic["gemm2"])]


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_errors_are_within_the_tolerance(backend, precision, regime, rows):
    """Of the kernel's own tiles with every block size. `L < k` has 4 experts for 8 ids; others have empty experts."""
    rows += rows % 2 if regime.layout == "pool" else 0
    runner = prepared(backend, layer_of(precision), regime, rows)
    reference = runner.reference()
    for size in (8, 16, 32, 48, 64):
        assert relative_error(runner.run(tactic_of(size)), reference) <= TOLERANCE, size


@pytest.mark.parametrize("rows", [7, 257])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tile_of_each_gemm_is_right(backend, worker, precision, rows):
    """None is refused by the op, none hangs."""
    layer, regime = layer_of(precision), REGIMES["all-gather"]
    bench = worker.bench(problem_of(layer, regime, rows))
    tactics = lines(backend, layer, regime, rows)
    assert [bench.check(tactic, 0) for tactic in tactics] == [True] * len(tactics), bench.failures


@pytest.mark.parametrize("rows", [1, 257])
@pytest.mark.parametrize("precision", ["mxint4", "mxfp4"])
def test_biases_activations_and_padded_sizes_are_right(backend, precision, rows):
    sizes = {"hidden_size": 1152, "intermediate_size": 288} if precision == "mxfp4" else {"intermediate_size": 288}
    for activation in ACTIVATIONS:
        sized = {"hidden_size": 1024, **sizes, "num_experts": 64, "top_k": 8}
        layer = tiny(precision, **sized, activation=activation, expert_bias=True)
        runner = prepared(backend, layer, Regime(ep_size=4), rows)
        reference = runner.reference()
        for size in (8, 64):
            assert relative_error(runner.run(tactic_of(size)), reference) <= TOLERANCE, (activation, size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_that_of_the_reference(activation):
    gate_up = (torch.randn(33, 2 * 1440, device="cuda") * 6).bfloat16()
    out = torch.empty(33, 1440, dtype=torch.bfloat16, device="cuda")
    activate(activation, gate_up, out)
    assert relative_error(out, reference_activation(activation, *gate_up.float().chunk(2, dim=-1))) < 2e-3


def test_refused_tiles_are_those_that_are_left_out(backend):
    """The op raises for tiles that divide nothing or have no kernel; the rest of the reasons would hang."""
    layer = MoELayer(num_experts=8, top_k=2, hidden_size=128, intermediate_size=64, precision="mxint4")
    runner = prepared(backend, layer, Regime(), 16)
    for tactic in (tactic_of(8, "64x256x1"), tactic_of(32, "128x128x1"), tactic_of(8, AUTO, "128x128x1")):
        assert tactic not in backend.candidates(layer, Regime(), 16, "cuda").tactics
        with pytest.raises(RuntimeError):
            runner.run(tactic)


@pytest.mark.parametrize("precision", PRECISIONS[:3])
def test_a_cuda_graph_replays_what_ran_eagerly(backend, precision):
    runner = prepared(backend, layer_of(precision), Regime(ep_size=4, layout="deduplicated"), 33, draws=2)
    tactic = tactic_of(16, "64x128x2", AUTO)
    assert replayed_error(runner, tactic) < 5e-3
