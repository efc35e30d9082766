import pytest
import torch

from moetune.dep_bench.router import Router
from moetune.errors import UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.scope import of_scope

LAYER = MoELayer(num_experts=16, top_k=2, hidden_size=64, intermediate_size=16)
TOKENS = 8192


def shares(layer, distribution, seed=0):
    router = Router(layer, distribution, seed, "cpu")
    x = torch.randn(TOKENS, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    ids, weights = router.top_k(router.logits(x))
    assert (ids.dtype, weights.dtype, weights.shape) == (torch.int32, torch.float32, (TOKENS, layer.top_k))
    return torch.bincount(ids.flatten(), minlength=layer.num_experts) / ids.numel()


def test_a_random_router_prefers_no_expert():
    assert shares(LAYER, "random").tolist() == pytest.approx([1 / 16] * 16, rel=0.12)


@pytest.mark.parametrize("distribution", ["zipf:0.5", "powerlaw:1.2"])
def test_under_a_skew_every_expert_has_its_share(distribution):
    chances = of_scope(LAYER, Regime(distribution=distribution)).chances
    wanted = [chance / LAYER.top_k for chance in chances]
    assert shares(LAYER, distribution).tolist() == pytest.approx(wanted, rel=0.15, abs=0.002)
    assert max(wanted) > 1.5 / 16


def test_a_router_with_groups_keeps_its_limit():
    layer = preset("deepseek-r1").model_copy(update={"hidden_size": 64})
    router = Router(layer, "zipf:0.5", 0, "cpu")
    ids, _ = router.top_k(router.logits(torch.randn(200, 64)))
    groups = [len(set(row)) for row in (ids // (256 // 8)).tolist()]
    assert max(groups) <= 4


def test_the_seed_alone_decides_the_weights():
    x = torch.randn(3, 64)
    first, again, other = (Router(LAYER, "random", seed, "cpu").logits(x) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("distribution", ["balanced", "replay:0123456789abcdef"])
def test_what_no_logits_have_is_refused(distribution):
    with pytest.raises(UsageError, match=f"A router's logits cannot have the distribution '?{distribution}"):
        Router(LAYER, distribution, 0, "cpu")
