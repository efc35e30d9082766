"""The real kernels on a GPU."""

import pytest
import torch
from graphs import replayed_error
from triton_numerics import rounded_reference, staged_errors

from moetune.backends.base import Problem
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.space import VALUES
from moetune.backends.reference import relative_error
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

pytestmark = pytest.mark.gpu

REGIMES = [
    Regime(ep_size=4),
    Regime(),
    Regime(ep_size=4, dispatch="allgather"),
    Regime(ep_size=4, attention_dp=True),
    Regime(ep_size=32, attention_dp=True),
    Regime(ep_size=4, layout="deduplicated"),
    Regime(ep_size=4, layout="slot"),
    Regime(ep_size=2, layout="pool"),
]
TACTICS = [
    Tactic(dict(zip(VALUES, values, strict=True)))
    for values in ((16, 64, 128, 1, 4, 4), (32, 32, 64, 64, 4, 5), (64, 128, 128, 16, 4, 3), (128, 128, 64, 32, 8, 3))
]


def prepared(precision, regime, rows, remote="drop", draws=1):
    layer = MoELayer(num_experts=64, top_k=8, hidden_size=1024, intermediate_size=512, precision=precision)
    rank = regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return TritonBackend(remote=remote).prepare(
        Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), "cuda")
    )


@pytest.mark.parametrize("remote", ["drop", "zero"])
@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.slug)
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_errors_are_within_rounding(precision, regime, rows, remote):
    """On every draw; against fp8's own roundings the whole layer over 16 rows at least, see `errors_of_stages`."""
    if regime.layout == "pool":
        rows += rows % 2
    draws = range(-(-16 // rows))
    runner = prepared(precision, regime, rows, remote, len(draws))
    rounded = [rounded_reference(runner, draw) for draw in draws]
    for tactic in TACTICS:
        outs = [runner.run(tactic, draw).clone() for draw in draws]
        for draw, out in enumerate(outs):
            assert relative_error(out, runner.reference(draw)) <= (1e-2 if precision == "bf16" else 8e-2)
            assert max(staged_errors(runner, tactic, draw)) <= 1e-2
            assert relative_error(out, rounded[draw]) <= 1e-2 or precision == "fp8_block"
        assert relative_error(torch.cat(outs), torch.cat(rounded)) <= 1e-2


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_a_cuda_graph_replays_what_ran_eagerly(precision):
    runner = prepared(precision, REGIMES[3], 33, draws=2)
    assert replayed_error(runner, TACTICS[0]) == 0.0


def test_a_device_has_limits_that_exclude_something():
    layer = MoELayer(num_experts=64, top_k=8, hidden_size=1024, intermediate_size=512)
    found = TritonBackend().candidates(layer, Regime(ep_size=4), 256, "cuda")
    assert any("shared memory" in reason for reason in found.excluded.values())
    assert any("registers" in reason for reason in found.excluded.values())
