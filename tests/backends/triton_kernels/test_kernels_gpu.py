"""The real triton_kernels on a Hopper GPU."""

import pytest
from graphs import replayed_error
from test_kernels_backend import REGIMES, problem_of, tiny

from moetune.backends.base import Problem
from moetune.backends.reference import relative_error
from moetune.backends.triton_kernels.backend import TOLERANCE, TritonKernelsBackend
from moetune.backends.triton_kernels.space import Flags, tactic_of
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def backend():
    made = TritonKernelsBackend()
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    return made


def prepared(backend, layer, regime, rows, draws=1):
    problem = problem_of(layer, regime, rows, regime.ep_size - 1, draws)
    return backend.prepare(Problem(layer, regime, rows, problem.shard, problem.draws, "cuda"))


def lines(backend, layer, regime, rows):
    """The default, and each of the flags of one GEMM with the default's of the other."""
    default, *others = backend.candidates(layer, regime, rows, "cuda").tactics
    return [default, *(each for each in others if sum(each[name] != default[name] for name in default) == 1)]


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_errors_are_within_the_tolerance(backend, regime, rows):
    """Of every block_m. `L < k` has 3 experts for 4 ids; others have empty experts. K = 192 ends in half a block."""
    runner = prepared(backend, tiny(), regime, rows)
    reference = runner.reference()
    for block_m in (16, 32, 64, 128):
        for block_k in (64, 128):
            flags = Flags(block_m, block_k, 3, 1)
            assert relative_error(runner.run(tactic_of(flags, flags)), reference) <= TOLERANCE, flags


@pytest.mark.parametrize("rows", [1, 16, 257])
def test_all_flags_of_each_gemm_are_right_for_gpt_oss(backend, rows):
    """With its own sizes, 2880 × 2880, and 16 of 128 experts."""
    layer, regime = preset("gpt-oss-120b"), Regime(ep_size=8, dispatch="allgather")
    runner = prepared(backend, layer, regime, rows)
    reference = runner.reference()
    for tactic in lines(backend, layer, regime, rows):
        assert relative_error(runner.run(tactic), reference) <= TOLERANCE, tactic


@pytest.mark.parametrize("sizes", [{"hidden_size": 2880, "intermediate_size": 720}, {"hidden_size": 512}])
@pytest.mark.parametrize("biased", [True, False])
def test_other_sizes_and_layers_without_biases_are_right(backend, sizes, biased):
    runner = prepared(backend, tiny(expert_bias=biased, **sizes), Regime(ep_size=4), 33)
    reference = runner.reference()
    for flags in (Flags(16, 64, 6, 1), Flags(16, 128, 4, 2), Flags(64, 128, 2, 1)):
        assert relative_error(runner.run(tactic_of(flags, flags)), reference) <= TOLERANCE, flags


def test_a_cuda_graph_replays_what_ran_eagerly(backend):
    runner = prepared(backend, tiny(), Regime(ep_size=4, layout="deduplicated"), 33, draws=2)
    tactic = tactic_of(Flags(16, 128, 4, 2), Flags(32, 64, 3, 1))
    assert replayed_error(runner, tactic) < 5e-3
