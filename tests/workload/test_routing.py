import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampling_cases import VIEWS, SamplingCase, deepseek_r1, digest_of_ids, moe, regime_of, sampling_cases

from moetune.errors import UsageError
from moetune.workload.dispatch import expect
from moetune.workload.law import local_slot_law
from moetune.workload.ranks import alike
from moetune.workload.router import representative_shard
from moetune.workload.routing import Routing, realize, stress

brief = settings(max_examples=40)


def local_mask(case: SamplingCase, routing: Routing) -> torch.Tensor:
    shard = case.regime.shard(case.layer, case.rank)
    return (routing.topk_ids >= shard.first) & (routing.topk_ids < shard.first + shard.num_local)


def counts_of(ids: torch.Tensor, num_slots: int) -> torch.Tensor:
    return torch.bincount(ids[ids >= 0].flatten(), minlength=num_slots)


def spread(counts: torch.Tensor) -> int:
    return int(counts.max() - counts.min())


def rows_are_distinct(ids: torch.Tensor, modulus: int) -> bool:
    """No two non-negative ids of a row are congruent."""
    places = torch.arange(ids.shape[1]) + modulus
    experts = torch.where(ids < 0, places, ids % modulus).sort(1).values
    return bool((experts[:, 1:] != experts[:, :-1]).all())


def same(one: Routing, other: Routing) -> bool:
    return torch.equal(one.topk_ids, other.topk_ids) and torch.equal(one.topk_weights, other.topk_weights)


@brief
@given(sampling_cases())
def test_shapes_ranges_and_load_fit_the_case(case: SamplingCase):
    layer, regime = case.layer, case.regime
    shard = regime.shard(layer, case.rank)
    routing = realize(*case.arguments)
    width = 1 if regime.layout == "slot" else layer.top_k
    assert routing.topk_ids.shape == routing.topk_weights.shape == (case.rows, width)
    assert (routing.topk_ids.dtype, routing.topk_weights.dtype) == (torch.int32, torch.float32)
    assert -1 <= int(routing.topk_ids.min()) <= int(routing.topk_ids.max()) < shard.num_physical
    assert routing.load.dtype == torch.int64
    expected = [int((routing.topk_ids == slot).sum()) for slot in range(shard.first, shard.first + shard.num_local)]
    assert routing.load.tolist() == expected
    assert ((routing.topk_weights > 0) == (routing.topk_ids >= 0)).all()


@brief
@given(sampling_cases())
def test_non_negative_ids_of_a_row_are_distinct(case: SamplingCase):
    assert rows_are_distinct(realize(*case.arguments).topk_ids, case.layer.num_experts)


@brief
@given(sampling_cases(redundant=True))
def test_no_row_holds_two_replicas_of_an_expert(case: SamplingCase):
    routing = realize(*case.arguments)
    assert rows_are_distinct(routing.topk_ids, case.layer.num_experts)
    local = local_mask(case, routing)
    assert int(local.sum()) == int(routing.load.sum())
    shard = case.regime.shard(case.layer, case.rank)
    match case.regime.layout:
        case "packed":
            assert local.sum(1).tolist() == [min(case.layer.top_k, shard.num_local)] * case.rows
        case "deduplicated":
            assert local.any(1).all()
            assert (routing.topk_ids >= 0).all()
        case "slot":
            assert local.all()
        case "pool":
            assert (local.any(1) == (routing.topk_ids >= 0).all(1)).all()
        case None:
            assert (routing.topk_ids >= 0).all()


@brief
@given(sampling_cases(distributions=("balanced",)))
def test_balanced_counts_in_scope_differ_by_at_most_one(case: SamplingCase):
    routing = realize(*case.arguments)
    if case.regime.dispatch == "alltoall":
        assert spread(routing.load) <= 1
    else:
        assert spread(counts_of(routing.topk_ids, case.layer.num_experts)) <= 1


@brief
@given(sampling_cases(views=("none", "allgather", "packed", "slot"), distributions=("balanced",), redundant=True))
def test_balance_counts_slots_where_replicas_can_be_kept_apart(case: SamplingCase):
    layer, regime = case.layer, case.regime
    shard = regime.shard(layer, case.rank)
    slots = shard.num_physical if regime.layout is None else shard.num_local
    copies = math.ceil(slots / min(layer.num_experts, slots))
    width = 1 if regime.layout == "slot" else min(layer.top_k, slots)
    assume(copies * width <= slots)
    routing = realize(*case.arguments)
    counts = routing.load if regime.layout else counts_of(routing.topk_ids, shard.num_physical)
    assert spread(counts) <= 1


def test_saturated_redundant_experts_stay_distinct_and_as_even_as_can_be():
    layer, regime = moe(4, 4), regime_of("none", 1, "balanced", redundant_experts=1)
    routing = realize(layer, regime, 100)
    assert rows_are_distinct(routing.topk_ids, 4)
    assert sorted(routing.load.tolist()) == [50, 50, 100, 100, 100]


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 100])
@pytest.mark.parametrize("top_k", [1, 4, 8])
def test_balanced_slots_spread_over_the_ranks_too(rows: int, top_k: int):
    layer, regime = moe(256, top_k), regime_of("none", 32, "balanced")
    by_rank = counts_of(realize(layer, regime, rows).topk_ids, 256).view(32, 8).sum(1)
    assert spread(by_rank) <= 1
    assert int(by_rank[0]) == int(by_rank.max())


@pytest.mark.parametrize("distribution", ["balanced", "random"])
def test_sixty_four_rows_at_ep_32_leave_no_half_of_the_ranks_idle(distribution: str):
    regime = regime_of("none", 32, distribution)
    loads = [int(realize(moe(256, 8), regime, 64, rank).load.sum()) for rank in range(32)]
    assert sum(load > 0 for load in loads) > 16


@brief
@given(sampling_cases(views=("packed",)))
def test_packed_has_exactly_min_k_l_local_slots_in_every_row(case: SamplingCase):
    shard = case.regime.shard(case.layer, case.rank)
    routing = realize(*case.arguments)
    per_row = local_mask(case, routing).sum(1)
    assert per_row.tolist() == [min(case.layer.top_k, shard.num_local)] * case.rows
    assert (routing.topk_ids >= 0).all()


@pytest.mark.parametrize("distribution", ["balanced", "random"])
@pytest.mark.parametrize("rows", [1, 64, 333])
def test_gpt_oss_120b_at_ep_64_has_two_local_and_two_non_local_ids_a_row(distribution: str, rows: int):
    layer, regime = moe(128, 4), regime_of("packed", 64, distribution)
    for rank in (0, 17, 63):
        case = SamplingCase(layer, regime, rows, rank)
        routing = realize(*case.arguments)
        assert routing.load.tolist() == [rows, rows]
        assert local_mask(case, routing).sum(1).tolist() == [2] * rows
        assert rows_are_distinct(routing.topk_ids, 128)


def test_packed_without_enough_local_experts_leaves_k_at_most_l_unchanged():
    regime = regime_of("packed", 64)
    assert realize(moe(128, 2), regime, 50).load.tolist() == [50, 50]


@brief
@given(sampling_cases(views=("deduplicated",)))
def test_deduplicated_rows_have_at_least_one_local_id_and_no_hole(case: SamplingCase):
    routing = realize(*case.arguments)
    assert local_mask(case, routing).any(1).all()
    assert (routing.topk_ids >= 0).all()


@pytest.mark.parametrize(
    ("layer", "ep_size"), [(moe(256, 8), 8), (moe(256, 8), 64), (moe(16, 12), 4), (deepseek_r1(), 8)]
)
def test_deduplicated_local_slots_have_the_mean_of_the_routers_law(layer, ep_size):
    rows, draws = 2048, 8
    regime = regime_of("deduplicated", ep_size)
    law = local_slot_law(layer, regime.shard(layer, 0))
    chances = [p / law.hit_fraction for p in law.probabilities[1:]]
    mean = sum(c * p for c, p in enumerate(chances, 1))
    variance = sum(c * c * p for c, p in enumerate(chances, 1)) - mean**2
    total = sum(int(realize(layer, regime, rows, draw=draw).load.sum()) for draw in range(draws))
    tolerance = 4 * math.sqrt(variance / (rows * draws)) + (0.01 if law.simulated else 0.0)
    assert abs(total / (rows * draws) - mean) < tolerance


@settings(brief, max_examples=20)
@given(sampling_cases(views=("deduplicated",), distributions=("balanced",)))
def test_balanced_deduplicated_rows_follow_the_law_by_rounded_quotas(case: SamplingCase):
    counts = local_mask(case, realize(*case.arguments)).sum(1).bincount(minlength=case.layer.top_k + 1)
    shard = representative_shard(case.layer, case.regime, case.rank)
    law = local_slot_law(case.layer, shard, case.regime.seed)
    for count, chance in enumerate(law.probabilities[1:], 1):
        assert abs(int(counts[count]) - case.rows * chance / law.hit_fraction) < 1


@brief
@given(sampling_cases(views=("slot",)))
def test_slot_has_one_local_id_a_row(case: SamplingCase):
    routing = realize(*case.arguments)
    assert routing.topk_ids.shape == (case.rows, 1)
    assert int(routing.load.sum()) == case.rows


@brief
@given(sampling_cases(views=("pool",)))
def test_a_pools_arrived_rows_lie_in_front_of_their_block_and_are_deduplicated_rows(case: SamplingCase):
    routing = realize(*case.arguments)
    arrived = (routing.topk_ids >= 0).all(1)
    assert (arrived | (routing.topk_ids == -1).all(1)).all()
    assert (local_mask(case, routing).any(1) == arrived).all()
    blocks = arrived.view(case.regime.ep_size, -1).int()
    assert (blocks[:, 1:] <= blocks[:, :-1]).all()


def test_a_pools_arrived_rows_are_the_hit_fraction_of_the_tokens():
    layer, regime, draws = moe(256, 8), regime_of("pool", 8), 8
    hit = local_slot_law(layer, regime.shard(layer, 0)).hit_fraction
    arrived = sum(int((realize(layer, regime, 1024, draw=draw).topk_ids[:, 0] >= 0).sum()) for draw in range(draws))
    trials = 1024 * draws
    assert abs(arrived / trials - hit) < 4 * math.sqrt(hit * (1 - hit) / trials)
    balanced = realize(layer, regime_of("pool", 8, "balanced"), 1024).topk_ids[:, 0] >= 0
    assert spread(balanced.view(8, -1).sum(1)) <= 1
    assert abs(int(balanced.sum()) - 1024 * hit) < 1


@brief
@given(sampling_cases(views=("none", "allgather")))
def test_global_dispatches_carry_k_ids_in_every_row(case: SamplingCase):
    routing = realize(*case.arguments)
    assert (routing.topk_ids >= 0).all()
    assert int(counts_of(routing.topk_ids, case.layer.num_experts).sum()) == case.rows * case.layer.top_k


@brief
@given(sampling_cases())
def test_where_ranks_are_alike_another_has_the_same_ids_shifted_by_whole_shards(case: SamplingCase):
    layer, regime = case.layer, case.regime
    assume(alike(layer, regime))
    mine, first = realize(*case.arguments), realize(layer, regime, case.rows, 0)
    offset = regime.shard(layer, case.rank).first
    shifted = torch.where(first.topk_ids < 0, -1, (first.topk_ids + offset) % layer.num_experts)
    assert torch.equal(mine.topk_ids, shifted)
    assert torch.equal(mine.topk_weights, first.topk_weights)
    assert torch.equal(mine.load, first.load)


@brief
@given(sampling_cases(), st.integers(0, 20))
def test_a_draw_repeats_exactly(case: SamplingCase, draw: int):
    assert same(realize(*case.arguments, draw=draw), realize(*case.arguments, draw=draw))


@pytest.mark.parametrize("distribution", ["balanced", "random"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_draw_and_seed_differs(view: str, distribution: str):
    regimes = [regime_of(view, 8, distribution, seed=seed) for seed in range(4)]
    drawn = {
        tuple(realize(moe(64, 4), regime, 32, draw=draw).topk_ids.flatten().tolist())
        for regime in regimes
        for draw in range(4)
    }
    assert len(drawn) == 16


def test_what_the_ids_do_not_depend_on():
    layer = moe(64, 4)
    other = layer.model_copy(update={"hidden_size": 128, "name": "other"})
    regime = regime_of("packed", 8)
    retold = regime_of("packed", 8, draws=3, tp_size=2, ladder="1,2,4")
    assert same(realize(layer, regime, 32), realize(other, retold, 32))


def test_two_processes_realize_identical_ids():
    """This one has one thread; the other one has all, another seed of its hashes, and a variable of TensorRT-LLM's."""
    environment = {"PYTHONHASHSEED": "2", "TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION": "balanced", "PATH": ""}
    here = str(Path(__file__).parent)
    printed = subprocess.run(
        [sys.executable, "-c", "from sampling_cases import digest_of_ids; print(digest_of_ids())"],
        env={**environment, "PYTHONPATH": ":".join([here, *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == digest_of_ids()


@pytest.mark.parametrize("routing", [None, deepseek_r1().routing])
@pytest.mark.parametrize("view", ["none", "packed", "deduplicated", "slot"])
def test_random_ids_are_uniform_over_seeds(view: str, routing):
    """Chi-square over the local experts. A row's ids exclude each other, so the statistic is if anything too small."""
    layer = moe(64, 4, routing)
    loads = [realize(layer, regime_of(view, 4, seed=seed), 64).load for seed in range(60)]
    counts = torch.stack(loads).sum(0).double()
    expected = counts.mean()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert expected > 200
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert chi_square > 0


@pytest.mark.parametrize("view", VIEWS)
def test_uneven_shards_are_served(view: str):
    layer, regime = moe(10, 3), regime_of(view, 4, "balanced", uneven_shards=True)
    for rank, num_local in enumerate((3, 3, 2, 2)):
        case = SamplingCase(layer, regime, 24, rank)
        routing = realize(*case.arguments)
        assert len(routing.load) == num_local
        assert rows_are_distinct(routing.topk_ids, 10)
        if regime.dispatch == "alltoall":
            assert spread(routing.load) <= 1
        else:
            assert spread(counts_of(routing.topk_ids, 10)) <= 1


@pytest.mark.parametrize("distribution", ["balanced", "random"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "ep_size"), [(4, 4, 1), (4, 4, 4), (16, 16, 16), (1, 1, 1), (16, 16, 2)]
)
def test_every_expert_chosen_is_no_special_case(view, distribution, num_experts, top_k, ep_size):
    rows = 2 * ep_size
    case = SamplingCase(moe(num_experts, top_k), regime_of(view, ep_size, distribution), rows, ep_size - 1)
    routing = realize(*case.arguments)
    if view == "slot":
        assert int(routing.load.sum()) == rows
    else:
        assert routing.load.tolist() == [rows] * (num_experts // ep_size)


def test_weights_of_a_row_add_up_to_the_routings_scaling():
    for view in ("none", "packed", "deduplicated"):
        for distribution in ("balanced", "random"):
            weights = realize(deepseek_r1(), regime_of(view, 8, distribution), 64).topk_weights
            assert torch.allclose(weights.sum(1), torch.full((64,), 2.5), atol=1e-5)


def test_a_routing_is_frozen():
    with pytest.raises(FrozenInstanceError):
        realize(moe(8, 2), regime_of("none", 1), 4).load = None


@pytest.mark.parametrize(
    ("view", "rows", "rank", "draw", "said"),
    [
        ("none", 0, 0, 0, "rows must be at least 1"),
        ("none", 4, 8, 0, "rank must be 0"),
        ("none", 4, 0, -1, "draw must be at least 0"),
        ("pool", 12, 0, 0, "multiple of 8"),
    ],
)
def test_what_cannot_be_realized_is_a_usage_error(view, rows, rank, draw, said):
    with pytest.raises(UsageError, match=said):
        realize(moe(64, 4), regime_of(view, 8), rows, rank, draw)


@brief
@given(sampling_cases(), st.sampled_from([2, 3, 4]))
def test_stress_raises_the_busiest_expert_and_keeps_rows_valid(case: SamplingCase, factor: int):
    layer, regime, _, rank = case.arguments
    before = realize(*case.arguments)
    after = stress(layer, regime, before, rank, factor)
    busiest = int(before.load.argmax())
    holding = int((before.topk_ids >= 0).any(1).sum())
    assert int(after.load[busiest]) == min(factor * int(before.load[busiest]), holding)
    assert rows_are_distinct(after.topk_ids, layer.num_experts)
    assert torch.equal(after.topk_ids < 0, before.topk_ids < 0)
    unchanged = torch.arange(len(before.load)) != busiest
    assert (after.load[unchanged] <= before.load[unchanged]).all()
    free = int((local_mask(case, before).any(1) & ~(before.topk_ids == _slot(case, busiest)).any(1)).sum())
    if int(after.load[busiest] - before.load[busiest]) <= free:
        assert int(after.load.sum()) == int(before.load.sum())


def _slot(case: SamplingCase, local: int) -> int:
    return case.regime.shard(case.layer, case.rank).first + local


@brief
@given(sampling_cases(redundant=True))
def test_stress_keeps_replicas_apart(case: SamplingCase):
    before = realize(*case.arguments)
    after = stress(case.layer, case.regime, before, case.rank, 3)
    assert rows_are_distinct(after.topk_ids, case.layer.num_experts)
    assert int(after.load.max()) <= case.rows


def test_stress_repeats_and_refuses_a_factor_below_one():
    layer, regime = moe(64, 4), regime_of("packed", 8)
    routing = realize(layer, regime, 64)
    assert same(stress(layer, regime, routing, 0, 4), stress(layer, regime, routing, 0, 4))
    with pytest.raises(UsageError, match="factor"):
        stress(layer, regime, routing, 0, 0.5)


@pytest.mark.parametrize("view", VIEWS)
def test_the_expected_load_is_the_mean_of_the_draws(view: str):
    layer, regime, rows, draws = moe(32, 4), regime_of(view, 4), 4, 300
    loads = torch.stack([realize(layer, regime, rows, draw=draw).load for draw in range(draws)]).double()
    expected = expect(layer, regime, rows)
    for measured, figure in (
        (loads.sum(1), expected.local_slots),
        ((loads > 0).double().sum(1), expected.active_experts),
    ):
        assert abs(float(measured.mean()) - figure) <= 4 * float(measured.std()) / math.sqrt(draws) + 1e-9
