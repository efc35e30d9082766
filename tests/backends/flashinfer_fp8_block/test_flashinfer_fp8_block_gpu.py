"""FlashInfer's kernels for fp8 blocks themselves, on a Hopper GPU that has their module built and nvcc."""

import pytest
import torch
from graphs import replayed_error

from moetune.backends.base import Problem
from moetune.backends.flashinfer_fp8_block.backend import FlashInferFp8BlockBackend
from moetune.backends.reference import relative_error
from moetune.backends.rival import ONLY_TACTIC
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

pytestmark = pytest.mark.gpu

LAYER = MoELayer(num_experts=64, top_k=8, hidden_size=1024, intermediate_size=512, precision="fp8_block")
REGIMES = [
    Regime(),
    Regime(ep_size=4),
    Regime(ep_size=4, dispatch="allgather"),
    Regime(ep_size=16, attention_dp=True),  # 4 local experts and k = 8
    Regime(ep_size=4, layout="deduplicated"),
    Regime(ep_size=4, layout="slot"),
    Regime(ep_size=2, layout="pool"),
    Regime(ep_size=4, tp_size=2),
]


@pytest.fixture(scope="module")
def backend():
    made = FlashInferFp8BlockBackend()
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    return made


def prepared(backend, regime, rows, draws=1, layer=LAYER):
    rank = regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return backend.prepare(Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), "cuda"))


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.slug)
def test_errors_are_within_the_tolerance(backend, regime, rows):
    rows += rows % 2 if regime.layout == "pool" else 0
    runner = prepared(backend, regime, rows)
    assert relative_error(runner.run(ONLY_TACTIC), runner.reference()) <= backend.tolerance(LAYER)


@pytest.mark.parametrize("rows", [3, 257])
def test_experts_without_rows_do_no_harm(backend, rows):
    """All ids name one local expert or another rank's."""
    runner = prepared(backend, Regime(ep_size=4, dispatch="allgather"), rows)
    ids, first = runner.inputs().topk_ids, 3 * LAYER.num_experts // 4
    ids.copy_(torch.arange(LAYER.top_k, device="cuda").expand_as(ids))
    ids[:, 0] = first + 5
    assert relative_error(runner.run(ONLY_TACTIC), runner.reference()) <= backend.tolerance(LAYER)
    ids[:, 0] = LAYER.top_k
    assert not runner.run(ONLY_TACTIC).any()


def test_a_cuda_graph_replays_what_ran_eagerly(backend):
    runner = prepared(backend, Regime(ep_size=4, dispatch="allgather"), 33, draws=2)
    assert replayed_error(runner, ONLY_TACTIC) < 5e-3


def test_deepseek_s_layer_is_computed_on_one_of_eight_ranks(backend):
    from moetune.inputs.presets import layer as preset

    layer = preset("deepseek-r1")
    runner = prepared(backend, Regime(ep_size=8, attention_dp=True, dispatch="allgather"), 128, layer=layer)
    assert relative_error(runner.run(ONLY_TACTIC), runner.reference()) <= backend.tolerance(layer)
