"""Whole forwards on expert-major buffers, under Triton's interpreter."""

import pytest
import torch

from moetune.backends.base import FillsPart, Problem
from moetune.backends.batched_triton.backend import BatchedTritonBackend
from moetune.backends.batched_triton.runner import BatchedRunner
from moetune.backends.batched_triton.space import VALUES
from moetune.backends.reference import relative_error
from moetune.measure.bench import Bench
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import Routing, padded, realize

CAPACITY = 40
REGIME = Regime(ep_size=4, layout="batched", ladder=[CAPACITY])
TACTICS = tuple(
    Tactic(dict(zip(VALUES, values, strict=True)))
    for values in ((16, 32, 64), (32, 64, 32), (64, 128, 128), (128, 32, 64))
)
TOLERANCE = {"bf16": 1e-2, "fp8_block": 8e-2}


def layer_of(precision, **fields):
    hidden, intermediate = (256, 128) if precision == "fp8_block" else (112, 48)
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": hidden, "intermediate_size": intermediate}
    return MoELayer(**{**sizes, "precision": precision, **fields})


def runner_of(layer, regime, routings, **options):
    draws = as_draws([padded(routing, regime.capacity) for routing in routings])
    problem = Problem(layer, regime, regime.capacity, regime.shard(layer), draws)
    return BatchedTritonBackend(**options).prepare(problem)


def loaded(*counts):
    """A routing with these numbers of slots of the local experts."""
    ids = torch.full((CAPACITY, 2), -1, dtype=torch.int32)
    return Routing(ids, torch.zeros(ids.shape), torch.tensor(counts))


def error_of(runner, tactic, draw=0):
    return relative_error(runner.filled(runner.run(tactic, draw), draw), runner.reference(draw))


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_right_for_every_kind_of_tile(precision, tactic):
    layer = layer_of(precision)
    runner = runner_of(layer, REGIME, [realize(layer, REGIME, 36)])
    assert error_of(runner, tactic) <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
@pytest.mark.parametrize("counts", [(1, 0), (0, 3), (16, 17), (CAPACITY, 0), (CAPACITY, CAPACITY), (15, 39)])
def test_right_for_empty_single_and_full_experts(counts, precision):
    runner = runner_of(layer_of(precision), REGIME, [loaded(*counts)])
    assert len(runner.reference()) == sum(counts)
    assert error_of(runner, TACTICS[0]) <= TOLERANCE[precision]
    assert error_of(runner, TACTICS[3]) <= TOLERANCE[precision]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_right_for_both_activations(activation):
    runner = runner_of(layer_of("bf16", activation=activation), REGIME, [loaded(7, 21)])
    assert error_of(runner, TACTICS[1]) <= 1e-2


def test_each_expert_has_its_own_weights_and_rows():
    runner = runner_of(layer_of("bf16"), REGIME, [loaded(5, 9)])
    filled = runner.filled(runner.run(TACTICS[0]), 0)
    for place, row in enumerate([*range(5), *range(CAPACITY, CAPACITY + 9)]):
        x = runner._x.flatten(0, 1)[row].float()
        alone = runner._expert(row // CAPACITY, x.unsqueeze(0))[0]
        assert relative_error(filled[place], alone) <= 2e-2


def test_rows_that_are_not_filled_are_never_written():
    runner = runner_of(layer_of("bf16"), REGIME, [loaded(5, 9), loaded(0, 0)])
    runner._gate_up = runner._gate_up.clone()  # a buffer of its own, so that what the output had before is known
    for draw, counts in ((1, (0, 0)), (0, (5, 9))):
        runner._out.fill_(3.0)
        written = (runner.run(TACTICS[2], draw) != 3.0).any(2)
        assert written.sum(1).tolist() == list(counts)
        assert len(runner.reference(draw)) == sum(counts)
    assert written[0, :5].all()
    assert written[1, :9].all()


def test_a_bench_compares_the_filled_rows_and_finds_a_wrong_result():
    layer = layer_of("bf16")
    backend = BatchedTritonBackend()
    draws = as_draws([padded(realize(layer, REGIME, 36), CAPACITY)])
    bench = Bench(backend, Problem(layer, REGIME, CAPACITY, REGIME.shard(layer), draws))
    runner = bench._runner
    assert isinstance(runner, BatchedRunner)
    assert isinstance(runner, FillsPart)
    assert bench.check(TACTICS[0], 0)
    runner._experts.w2.values[1, :16] = 0  # the bench keeps the reference of the right weights
    assert not bench.check(TACTICS[1], 0)
    assert "wrong result" in bench.failures[TACTICS[1]]


def test_row_counts_share_weights_and_inputs():
    layer, backend = layer_of("bf16"), BatchedTritonBackend()
    first, second = (
        backend.prepare(Problem(layer, REGIME, rows, REGIME.shard(layer), as_draws([realize(layer, REGIME, rows)])))
        for rows in (8, 36)
    )
    assert first._experts is second._experts
    assert torch.equal(first._x, second._x)
    assert first._x.shape == (2, CAPACITY, 112)
