"""vLLM's experts classes themselves, on a Hopper GPU with an installed vLLM, and nvcc for DeepGEMM."""

from dataclasses import replace

import pytest
import torch
from graphs import replayed_error

from moetune.backends.base import Problem
from moetune.backends.reference import relative_error
from moetune.backends.registry import backend
from moetune.backends.rival import ONLY_TACTIC
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import padded, realize

pytestmark = pytest.mark.gpu

CASES = [("deep-gemm", "fp8_block"), ("vllm-cutlass", "fp8_tensor"), ("vllm-cutlass", "fp8_channel")]
REGIMES = [
    Regime(),
    Regime(ep_size=4),
    Regime(ep_size=4, dispatch="allgather"),
    Regime(ep_size=16, attention_dp=True),  # 4 local experts and k = 8
    Regime(ep_size=4, layout="deduplicated"),
    Regime(ep_size=4, layout="slot"),
    Regime(ep_size=4, tp_size=2),
]


def layer_of(precision):
    return MoELayer(num_experts=64, top_k=8, hidden_size=1024, intermediate_size=512, precision=precision)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def rival(request):
    name, precision = request.param
    made = backend(name)
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    return made, layer_of(precision)


def prepared(rival, regime, rows, draws=1):
    made, layer = rival
    if reason := made.unsupported(layer, regime):
        pytest.skip(reason)
    rank = regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return made.prepare(Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), "cuda"))


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.slug)
def test_errors_are_within_the_tolerance(rival, regime, rows):
    runner = prepared(rival, regime, rows)
    assert relative_error(runner.run(ONLY_TACTIC), runner.reference()) <= rival[0].tolerance(rival[1])


@pytest.mark.parametrize("rows", [3, 257])
def test_experts_without_rows_do_no_harm(rival, rows):
    """All slots but one of a row are of other ranks, and that one is of one expert."""
    runner, layer = prepared(rival, Regime(ep_size=4, dispatch="allgather"), rows), rival[1]
    ids = runner.inputs().topk_ids
    ids.copy_(torch.arange(layer.top_k, device="cuda").expand_as(ids))
    ids[:, 0] = 3 * layer.num_experts // 4 + 5
    assert relative_error(runner.run(ONLY_TACTIC), runner.reference()) <= rival[0].tolerance(layer)
    ids[:, 0] = layer.top_k
    assert not runner.run(ONLY_TACTIC).any()


def test_a_cuda_graph_replays_what_ran_eagerly(rival):
    runner = prepared(rival, Regime(ep_size=4, dispatch="allgather"), 129, draws=2)
    assert replayed_error(runner, ONLY_TACTIC) < 5e-3


@pytest.fixture(scope="module")
def batched():
    made = backend("batched-deep-gemm")
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    return made


@pytest.mark.parametrize("tokens", [4, 16, 260, 4096])
@pytest.mark.parametrize("ep", [4, 16])
def test_the_masked_kernels_compute_the_filled_rows(batched, ep, tokens):
    """With few tokens some experts have no rows; at EP 16 a rank has 4 experts and k = 8."""
    layer = layer_of("fp8_block")
    regime = Regime(ep_size=ep, layout="batched", ladder=[4096])
    routing = padded(realize(layer, regime, tokens, ep - 1), regime.capacity)
    draws = tuple(replace(draw, rows=tokens) for draw in as_draws([routing]))
    runner = batched.prepare(Problem(layer, regime, 4096, regime.shard(layer, ep - 1), draws, "cuda"))
    filled = runner.filled(runner.run(ONLY_TACTIC), 0)
    assert len(filled) == int(routing.load.sum())
    assert relative_error(filled, runner.reference()) <= batched.tolerance(layer)


def test_deepseek_s_layer_is_computed_by_deepgemm_on_one_of_eight_ranks():
    made, layer = backend("deep-gemm"), preset("deepseek-r1")
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    runner = prepared((made, layer), Regime(ep_size=8, attention_dp=True, dispatch="allgather"), 128)
    assert relative_error(runner.run(ONLY_TACTIC), runner.reference()) <= made.tolerance(layer)
