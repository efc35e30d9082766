import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.workload.distribution import (
    deal,
    deal_counts,
    interleaved_order,
    quotas,
    seeded_generator,
    spaced_order,
    uniform_subsets,
)

brief = settings(max_examples=80)


def test_the_seed_depends_on_every_part_of_the_key():
    first = [seeded_generator(*key).initial_seed() for key in ((1, 2), (2, 1), (12,), ("1", 2))]
    assert len(set(first)) == 4
    assert seeded_generator(1, 2).initial_seed() == first[0]


@brief
@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 1000))
def test_subsets_have_distinct_members(population: int, size: int, seed: int):
    size = min(size, population)
    chosen = uniform_subsets(seeded_generator(seed), 30, population, size)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < population
    assert all(len(set(row)) == size for row in chosen.tolist())


def test_every_ordered_subset_is_equally_likely():
    rows = 24000
    chosen = uniform_subsets(seeded_generator("uniform"), rows, 4, 3)
    counts = torch.bincount((chosen * torch.tensor([16, 4, 1])).sum(1))
    counts = counts[counts > 0]
    assert len(counts) == 24
    chi_square = float(((counts - rows / 24) ** 2 / (rows / 24)).sum())
    assert chi_square < 23 + 4 * math.sqrt(2 * 23)


@brief
@given(st.lists(st.floats(0, 1), min_size=1, max_size=17).filter(lambda p: sum(p) > 1e-3), st.integers(1, 5000))
def test_quotas_add_up_and_are_off_by_less_than_one(probabilities: list[float], total: int):
    counts = quotas(probabilities, total)
    assert sum(counts) == total
    for count, probability in zip(counts, probabilities, strict=True):
        assert abs(count - total * probability / sum(probabilities)) < 1 + 1e-9


@brief
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 100))
def test_an_interleaved_order_visits_every_slot_once_and_its_own_shard_first(sizes: list[int], seed: int):
    sizes = [max(sizes) - (size % 2) * (max(sizes) > 1) for size in sizes]
    own = sizes.index(max(sizes))
    order = interleaved_order(seeded_generator(seed), sizes, own).tolist()
    assert sorted(order) == list(range(sum(sizes)))
    owner = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    assert owner[order[0]] == own
    assert len({owner[slot] for slot in order[: len(sizes)]}) == len(sizes)


@brief
@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 16), st.integers(0, 100))
def test_a_spaced_order_keeps_replicas_a_gap_apart_wherever_that_is_possible(
    num_experts: int, redundant: int, gap: int, seed: int
):
    gap, slots = min(gap, num_experts), num_experts + redundant
    order = spaced_order(seeded_generator(seed), slots, num_experts, gap)
    possible = math.ceil(slots / num_experts) * gap <= slots
    assert (order is not None) == possible
    if order is not None:
        assert sorted(order.tolist()) == list(range(slots))
        around = (order % num_experts).tolist() * 2
        assert all(len(set(around[start : start + gap])) == gap for start in range(slots))


@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (7, 3), (100, 8)])
def test_dealing_goes_round(rows: int, top_k: int):
    order = torch.randperm(12, dtype=torch.int32)
    dealt = deal(order, rows, top_k)
    assert dealt.flatten().tolist() == [int(order[i % 12]) for i in range(rows * top_k)]
    assert dealt.dtype == torch.int32


def test_dealing_counts_leaves_holes_after_them():
    dealt = deal_counts(torch.tensor([5, 6, 7]), torch.tensor([2, 0, 3, 1]), 3)
    assert dealt.tolist() == [[5, 6, -1], [-1, -1, -1], [7, 5, 6], [7, -1, -1]]
