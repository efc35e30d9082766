"""The real batched kernel on a GPU."""

import pytest
from graphs import replayed_error

from moetune.backends.base import Problem
from moetune.backends.batched_triton.backend import BatchedTritonBackend
from moetune.backends.batched_triton.space import VALUES
from moetune.backends.reference import relative_error
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import padded, realize

pytestmark = pytest.mark.gpu

TACTICS = [
    Tactic(dict(zip(VALUES, values, strict=True)))
    for values in ((16, 64, 128), (32, 32, 64), (64, 128, 128), (128, 128, 64))
]


def prepared(precision, regime, *counts):
    layer = MoELayer(num_experts=64, top_k=8, hidden_size=1024, intermediate_size=512, precision=precision)
    draws = as_draws(
        [padded(realize(layer, regime, rows, 0, draw), regime.capacity) for draw, rows in enumerate(counts)]
    )
    problem = Problem(layer, regime, regime.capacity, regime.shard(layer), draws, "cuda")
    return BatchedTritonBackend().prepare(problem)


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("ep_size", [1, 4, 32])  # L < k at 32
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_errors_are_within_rounding(precision, ep_size, rows):
    runner = prepared(precision, Regime(ep_size=ep_size, layout="batched", ladder=[4096]), rows)
    for tactic in TACTICS:
        filled = runner.filled(runner.run(tactic), 0)
        assert relative_error(filled, runner.reference()) <= (1e-2 if precision == "bf16" else 8e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_a_cuda_graph_replays_what_ran_eagerly(precision):
    runner = prepared(precision, Regime(ep_size=4, layout="batched"), 33, 900)
    assert replayed_error(runner, TACTICS[0]) == 0.0
