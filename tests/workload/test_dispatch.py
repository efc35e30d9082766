import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import VIEWS, deepseek_r1, moe, regime_of

from moetune.workload.dispatch import (
    active_experts,
    expect,
    local_slots,
    rows_for_tokens,
    tokens_for_rows,
)
from moetune.workload.distribution import seeded_generator
from moetune.workload.law import local_slot_law
from moetune.workload.router import random_top_k
from moetune.workload.routing import realize

SMALL = [(4, 2, 2), (6, 3, 3), (6, 2, 2), (5, 4, 5), (8, 3, 2), (6, 6, 2)]


def subsets_of_experts(num_experts: int, top_k: int) -> list[set[int]]:
    return [set(chosen) for chosen in itertools.combinations(range(num_experts), top_k)]


def mean_over(rows: list[set[int]], count: int, local: set[int]) -> tuple[float, float]:
    """Mean local slots and mean active local experts over every way to take `count` of `rows`, independently."""
    ways = list(itertools.product(rows, repeat=count))
    slots = sum(len(row & local) for way in ways for row in way) / len(ways)
    active = sum(len(set().union(*way) & local) for way in ways) / len(ways)
    return slots, active


@pytest.mark.parametrize(("num_experts", "top_k", "ep_size"), SMALL)
def test_the_law_of_local_slots_is_that_of_exact_enumeration(num_experts, top_k, ep_size):
    layer, regime = moe(num_experts, top_k), regime_of("deduplicated", ep_size)
    local = set(range(num_experts // ep_size))
    chosen = subsets_of_experts(num_experts, top_k)
    law = local_slot_law(layer, regime.shard(layer, 0))
    for count in range(top_k + 1):
        exact = sum(len(row & local) == count for row in chosen) / len(chosen)
        assert law.probabilities[count] == pytest.approx(exact, abs=1e-12)
    assert not law.simulated
    assert law.hit_fraction == pytest.approx(sum(bool(row & local) for row in chosen) / len(chosen))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("num_experts", "top_k", "ep_size"), SMALL)
@pytest.mark.parametrize("view", ["none", "allgather", "packed", "deduplicated", "pool"])
def test_slots_and_active_experts_are_those_of_exact_enumeration(view, num_experts, top_k, ep_size, rows):
    layer, regime = moe(num_experts, top_k), regime_of(view, ep_size)
    num_local = num_experts // ep_size
    local = set(range(num_local))
    chosen = subsets_of_experts(num_experts, top_k)
    if view == "packed":
        chosen = subsets_of_experts(num_local, min(top_k, num_local))
    if view == "deduplicated":
        chosen = [row for row in chosen if row & local]
    slots, active = mean_over(chosen, rows, local)
    assert local_slots(layer, regime, rows) == pytest.approx(slots)
    assert active_experts(layer, regime, rows) == pytest.approx(active)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("num_experts", "top_k", "ep_size"), [(4, 2, 2), (5, 3, 1), (4, 3, 2), (6, 2, 2)])
def test_active_experts_of_the_slot_layout_are_those_of_exact_enumeration(num_experts, top_k, ep_size, rows):
    """Every sequence of arriving rows in every order, cut after `rows` local slots."""
    layer, regime = moe(num_experts, top_k), regime_of("slot", ep_size)
    num_local = num_experts // ep_size
    ordered = itertools.permutations(range(num_experts), top_k)
    brought = [[e for e in row if e < num_local] for row in ordered]
    arriving = [row for row in brought if row]
    ways = list(itertools.product(arriving, repeat=rows))
    active = sum(len(set(list(itertools.chain(*way))[:rows])) for way in ways) / len(ways)
    assert local_slots(layer, regime, rows) == pytest.approx(rows)
    assert active_experts(layer, regime, rows) == pytest.approx(active)


@pytest.mark.parametrize("redundant_experts", [2, 8, 24])
@pytest.mark.parametrize("view", VIEWS)
def test_redundant_experts_agree_with_simulation_within_four_sigma(view: str, redundant_experts: int):
    layer, draws = moe(16, 4), 250
    regime = regime_of(view, 2, redundant_experts=redundant_experts)
    rank = 1
    loads = torch.stack([realize(layer, regime, 4, rank, draw).load for draw in range(draws)]).double()
    expected = expect(layer, regime, 4, rank)
    assert not expected.simulated
    for measured, figure in (
        (loads.sum(1), expected.local_slots),
        ((loads > 0).double().sum(1), expected.active_experts),
    ):
        sigma = max(float(measured.std()), 0.1) / math.sqrt(draws)
        assert abs(float(measured.mean()) - figure) <= 4 * sigma + 1e-9


def test_deepseek_r1_sends_just_under_half_of_its_tokens_to_a_rank_at_ep_8():
    layer, regime = deepseek_r1(), regime_of("deduplicated", 8)
    expected = expect(layer, regime, 64)
    assert expected.simulated
    assert 0.45 <= expected.hit_fraction <= 0.50
    slots, _ = random_top_k(seeded_generator("another"), layer, 0, 256, 8192, 8)
    arrived = float((slots < 32).any(1).double().mean())
    assert abs(arrived - expected.hit_fraction) < 4 * math.sqrt(0.25 / 8192)
    ungrouped = expect(moe(256, 8), regime, 64)
    assert not ungrouped.simulated
    assert ungrouped.hit_fraction == pytest.approx(0.66, abs=0.005)


@pytest.mark.parametrize(
    ("view", "rows"),
    [("none", 100), ("packed", 100), ("allgather", 800), ("pool", 800), ("slot", 800)],
)
def test_rows_for_a_hundred_tokens_a_rank(view: str, rows: int):
    assert rows_for_tokens(moe(256, 8), regime_of(view, 8), 100) == pytest.approx(rows)


def test_deduplicated_rows_for_tokens_are_the_hits_of_all_ranks_tokens():
    layer, regime = moe(256, 8), regime_of("deduplicated", 8)
    miss = math.comb(224, 8) / math.comb(256, 8)
    assert rows_for_tokens(layer, regime, 100) == pytest.approx(800 * (1 - miss))


@settings(max_examples=40)
@given(st.sampled_from(list(VIEWS)), st.sampled_from([1, 2, 8, 32]), st.integers(1, 8192))
def test_tokens_for_rows_is_the_inverse_of_rows_for_tokens(view: str, ep_size: int, tokens: int):
    layer, regime = moe(64, 4), regime_of(view, ep_size)
    assert tokens_for_rows(layer, regime, rows_for_tokens(layer, regime, tokens)) == pytest.approx(tokens)


@pytest.mark.parametrize("view", VIEWS)
def test_a_balanced_expectation_is_counted_from_the_dummy(view: str):
    layer, regime = moe(64, 4), regime_of(view, 8, "balanced")
    load = realize(layer, regime, 16, 3).load
    expected = expect(layer, regime, 16, 3)
    assert expected.local_slots == int(load.sum())
    assert expected.active_experts == int((load > 0).sum())
    assert expected.slots_per_expert == expected.local_slots / 8
    assert not expected.simulated
