import math

import pytest
import torch
from sampling_cases import deepseek_r1, moe

from moetune.spec.layer import RoutingMethod
from moetune.workload.distribution import random_logits, seeded_generator
from moetune.workload.router import random_top_k, route


def logits(*row: float) -> torch.Tensor:
    return torch.tensor([row], dtype=torch.float64)


def test_softmax_weights_renormalized_and_not():
    row = logits(math.log(1), math.log(2), math.log(4), math.log(1))
    experts, weights = route(RoutingMethod(), row, 2)
    assert experts.tolist() == [[2, 1]]
    assert weights[0].tolist() == pytest.approx([4 / 6, 2 / 6])
    _, weights = route(RoutingMethod(renormalize=False, scaling=3.0), row, 2)
    assert weights[0].tolist() == pytest.approx([3 * 4 / 8, 3 * 2 / 8])


def test_a_bias_changes_the_choice_and_not_the_weight():
    method = RoutingMethod(scoring="sigmoid", bias=True, renormalize=False)
    row, bias = logits(0.0, 2.0, -2.0), torch.tensor([0.0, 0.0, 10.0], dtype=torch.float64)
    experts, weights = route(method, row, 2, bias)
    assert experts.tolist() == [[2, 1]]
    assert weights[0].tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])


def test_a_group_is_as_good_as_its_two_best_or_its_best_expert():
    row = logits(3.0, -9.0, -9.0, 1.0, 1.0, -9.0)  # sigmoid: 0.95 + 0 against 0.73 + 0.73
    groups = {"scoring": "sigmoid", "num_groups": 2, "top_k_groups": 1}
    assert sorted(route(RoutingMethod(**groups, group_score="top2"), row, 2)[0][0].tolist()) == [3, 4]
    assert route(RoutingMethod(**groups, group_score="max"), row, 1)[0].tolist() == [[0]]


def test_grouped_choice_agrees_with_a_plain_loop():
    method = deepseek_r1().routing
    rows = random_logits(seeded_generator("loop"), 50, 256)
    experts, weights = route(method, rows, 8)
    for row, chosen, weight in zip(rows.sigmoid().tolist(), experts.tolist(), weights, strict=True):
        groups = [range(first, first + 32) for first in range(0, 256, 32)]
        groups.sort(key=lambda group, row=row: -sum(sorted(row[e] for e in group)[-2:]))
        allowed = [e for group in groups[:4] for e in group]
        assert chosen == sorted(allowed, key=lambda e, row=row: -row[e])[:8]
        total = sum(row[e] for e in chosen)
        assert weight.tolist() == pytest.approx([2.5 * row[e] / total for e in chosen], rel=1e-5)


@pytest.mark.parametrize(("first", "count", "groups"), [(0, 32, 1), (64, 64, 2), (0, 256, 4), (128, 128, 4)])
def test_a_shard_of_whole_groups_keeps_the_group_limit(first: int, count: int, groups: int):
    slots, _ = random_top_k(seeded_generator("shard"), deepseek_r1(), first, count, 200, 8)
    assert int(slots.min()) >= first
    assert int(slots.max()) < first + count
    used = [len(set((row // 32).tolist())) for row in slots]
    assert max(used) == groups


def test_a_shard_that_cuts_a_group_is_chosen_from_without_groups():
    layer = moe(64, 4, RoutingMethod(num_groups=4, top_k_groups=1))
    slots, _ = random_top_k(seeded_generator("cut"), layer, 0, 24, 200, 4)
    assert any(len(set((row // 16).tolist())) == 2 for row in slots)


def test_replicas_of_an_expert_are_chosen_evenly():
    slots, _ = random_top_k(seeded_generator("replicas"), moe(4, 2), 0, 10, 6000, 2)
    counts = torch.bincount(slots.flatten(), minlength=10)
    for expert, replicas in ((0, 3), (1, 3), (2, 2), (3, 2)):
        share = 0.5 * 6000 / replicas
        for slot in range(expert, 10, 4):
            assert abs(int(counts[slot]) - share) < 4 * math.sqrt(share)
