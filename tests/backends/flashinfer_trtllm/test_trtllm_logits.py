"""From the logits, each of the kernel's routing methods picks exactly the intended experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_questions import DEEPSEEK, REGIMES, ROUTERS, layer

from moetune.backends.flashinfer_trtllm import logits as made
from moetune.errors import UnsupportedError
from moetune.inputs.presets import names, preset
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime, Shard
from moetune.workload.draws import sampled, typical_rows
from moetune.workload.router import route
from moetune.workload.routing import realize

LLAMA4 = RoutingMethod(scoring="sigmoid", renormalize=False)


def rows_of(ids: torch.Tensor) -> list[list[int]]:
    return ids.sort(1).values.tolist()


@settings(max_examples=60)
@given(
    method=st.sampled_from([*ROUTERS.values(), LLAMA4]),
    num_experts=st.sampled_from([16, 64, 256]),
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_the_reference_router_picks_the_ids_that_the_logits_were_made_for(
    method: RoutingMethod, num_experts: int, rows: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, 8), "top_k")
    generator = torch.Generator().manual_seed(seed)
    if method.grouped:  # ids within top_k_groups groups
        size = num_experts // method.num_groups
        top_k = min(top_k, size * method.top_k_groups)
        allowed = torch.rand(rows, method.num_groups, generator=generator).argsort(1) < method.top_k_groups
        keys = torch.rand(rows, num_experts, generator=generator) + allowed.repeat_interleave(size, 1)
    else:
        keys = torch.rand(rows, num_experts, generator=generator)
    ids = keys.topk(top_k, dim=1).indices
    asked = layer(num_experts=num_experts, top_k=top_k, routing=method)
    routing = made.kernel_routing(asked).within_groups(num_experts, ids)
    assert routing.method.grouped == method.grouped
    logits = made.random_logits(ids, num_experts, routing, seed)
    bias = made.correction_bias(num_experts, routing, seed)
    assert logits.dtype == (torch.float32 if method.bias else torch.bfloat16)
    assert (bias is not None) == method.bias
    chosen, weights = route(method.model_copy(update={"scaling": 1.0}), logits.float(), top_k, bias)
    assert rows_of(chosen) == rows_of(ids)
    picked, kernels = made.kernel_choice(logits, routing, top_k, bias)
    assert torch.equal(picked, chosen)
    scaling = method.scaling if method.bias else 1.0
    assert torch.allclose(kernels, weights * scaling)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_bias_against_every_chosen_expert_changes_no_choice(sign: float) -> None:
    asked = layer(num_experts=64, top_k=4, routing=DEEPSEEK)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(200, 32, generator=generator).topk(4, dim=1).indices  # groups 0 and 1 of 4
    routing = made.kernel_routing(asked)
    logits = made.random_logits(ids, 64, routing, 0)
    for row, wanted in zip(logits, ids, strict=True):
        bias = torch.full((64,), sign * made.LARGEST_BIAS)
        bias[wanted] *= -1
        chosen, _ = made.kernel_choice(row.unsqueeze(0), routing, 4, bias)
        assert rows_of(chosen) == rows_of(wanted.unsqueeze(0))


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("distribution", ["random", "balanced"])
@pytest.mark.parametrize("router", [*ROUTERS, "Llama4"])
def test_every_method_yields_every_regimes_load(name: str, distribution: str, router: str) -> None:
    asked = layer(top_k=1, routing=LLAMA4) if router == "Llama4" else layer(routing=ROUTERS[router])
    regime = Regime(**REGIMES[name], distribution=distribution)
    for rank in (0, 3):
        routing, shard = realize(asked, regime, 24, rank), regime.shard(asked, rank)
        ids = made.complete_rows(routing.topk_ids, shard)
        kernel = made.kernel_routing(asked).within_groups(16, ids)
        assert kernel.name == router
        logits = made.random_logits(ids, 16, kernel, 0)
        chosen, _ = made.kernel_choice(logits, kernel, ids.shape[1], made.correction_bias(16, kernel, 0))
        assert rows_of(chosen) == rows_of(ids.long())
        counts = torch.bincount(chosen.flatten(), minlength=16)[shard.first : shard.first + shard.num_local]
        assert torch.equal(counts, routing.load)


def test_a_layers_own_groups_are_kept_and_balanced_ids_that_exceed_them_go_without() -> None:
    asked = preset("deepseek-r1")
    routing = made.kernel_routing(asked)
    for distribution, grouped in (("random", True), ("balanced", False)):
        ids = realize(asked, Regime(ep_size=8, distribution=distribution), 64).topk_ids
        assert routing.within_groups(256, ids).method.grouped == grouped


@settings(max_examples=40)
@given(
    num_shards=st.sampled_from([2, 4, 8]),
    rank=st.integers(0, 1),
    top_k=st.integers(1, 8),
    rows=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_empty_slots_become_distinct_experts_of_other_ranks(
    num_shards: int, rank: int, top_k: int, rows: int, seed: int
) -> None:
    shard = Shard(rank, rank * 32 // num_shards, 32 // num_shards, 32)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, 32, generator=generator).topk(top_k, dim=1).indices.int()
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = -1
    completed = made.complete_rows(ids, shard)
    assert torch.equal(completed[ids >= 0], ids[ids >= 0])
    assert int(completed.min()) >= 0
    assert all(len(set(row)) == top_k for row in completed.tolist())
    new = completed[ids < 0]
    assert not ((new >= shard.first) & (new < shard.first + shard.num_local)).any()


@pytest.mark.parametrize("ep_size", [8, 32])
def test_rows_of_nothing_keep_within_the_groups_of_the_layers_router(ep_size: int) -> None:
    """Of a bucket's draws some have fewer rows, the rest is −1; all draws must have the same routing kernel."""
    asked, regime = preset("deepseek-r1"), Regime(ep_size=ep_size, layout="deduplicated", ladder="hybrid")
    shard = regime.shard(asked)
    for draw in sampled(asked, regime, 512, typical_rows(asked, regime, 512), range(2), "search"):
        topk_ids = draw.routing.topk_ids
        ids = made.complete_rows(topk_ids, shard)
        assert made.kernel_routing(asked).within_groups(256, ids).method.grouped
        nothing = (topk_ids < 0).all(1)
        assert all(len(set(row)) == 8 for row in ids[nothing].tolist())
        assert not ((ids[nothing] >= shard.first) & (ids[nothing] < shard.first + shard.num_local)).any()


def test_rows_that_no_other_ranks_experts_can_fill_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="the other ranks have only 2"):
        made.complete_rows(torch.tensor([[-1, -1, -1]]), Shard(0, 0, 6, 8))


NO_METHOD = {"deepseek-v2", "ernie-4.5-21b-a3b"}  # a softmax with groups; a softmax with a bias


@pytest.mark.parametrize("name", names())
def test_every_presets_router_has_a_method_or_a_reason(name: str) -> None:
    asked: MoELayer = preset(name)
    if name in NO_METHOD:
        with pytest.raises(UnsupportedError, match="a softmax with"):
            made.kernel_routing(asked)
        return
    expected = {
        ("softmax", False, True): "Renormalize",
        ("sigmoid", True, True): "MiniMax2" if asked.routing.scaling == 1.0 else "DeepSeekV3",
        ("sigmoid", False, False): "Llama4",
    }[asked.routing.scoring, asked.routing.bias, asked.routing.renormalize]
    assert made.kernel_routing(asked).name == expected
