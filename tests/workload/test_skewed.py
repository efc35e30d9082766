import hashlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import DEEPSEEK_ROUTING, VIEWS, deepseek_r1, moe, regime_of

from moetune.errors import UsageError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.dispatch import expect
from moetune.workload.placed import copies_of, physical_shares, skew_shares
from moetune.workload.rank_law import row_chances, scope_preferences, slot_law, token_chances
from moetune.workload.ranks import tuned_rank
from moetune.workload.routing import Routing, realize, stress
from moetune.workload.skew import effective_experts

brief = settings(max_examples=60)
SPELLED = st.sampled_from(
    ["ddist:1", "ddist:1.5", "ddist:4", "ddist:100", "zipf:0", "zipf:1", "zipf:3", "powerlaw:1.2"]
)
SKEWED = ("ddist:2", "zipf:1", "powerlaw:1.2")


@st.composite
def cases(draw: st.DrawFn, views: tuple[str, ...] = tuple(VIEWS)) -> tuple[MoELayer, Regime, int, int]:
    """A layer without groups, a skewed regime with or without redundant experts, rows and a rank."""
    num_experts = draw(st.sampled_from([4, 8, 16, 60, 128, 256]) | st.integers(2, 200))
    redundant = draw(st.just(0) | st.integers(1, num_experts))
    slots = num_experts + redundant
    ep_size = draw(st.sampled_from([ep for ep in range(1, min(32, slots) + 1) if slots % ep == 0]))
    top_k = draw(st.integers(1, min(12, num_experts)))
    view, rows = draw(st.sampled_from(views)), draw(st.integers(1, 64) | st.sampled_from([257, 1024]))
    if view == "pool":
        rows = max(1, rows // ep_size) * ep_size
    eplb: Any = draw(st.sampled_from(["vllm", "sglang", "trtllm"])) if redundant else None
    seed = draw(st.integers(0, 1))
    regime = regime_of(view, ep_size, draw(SPELLED), redundant_experts=redundant, eplb=eplb, seed=seed)
    return moe(num_experts, top_k), regime, rows, draw(st.integers(0, ep_size - 1))


def check_valid(layer: MoELayer, regime: Regime, rows: int, rank: int, routing: Routing) -> None:
    """Checks shape, range, distinct experts, and that rows have the local slots that the layout promises."""
    ids, shard = routing.topk_ids, regime.shard(layer, rank)
    width = regime.row_top_k(layer)
    assert ids.shape == routing.topk_weights.shape == (rows, width)
    assert -1 <= int(ids.min()) <= int(ids.max()) < shard.num_physical
    experts = torch.tensor(copies_of(layer, regime))
    for row in ids.tolist():
        assert len({int(experts[slot]) for slot in row if slot >= 0}) == sum(slot >= 0 for slot in row)
        assert -1 not in row or (regime.layout == "pool" and set(row) == {-1})
    local = ((ids >= shard.first) & (ids < shard.first + shard.num_local)).sum(1)
    here = set(copies_of(layer, regime)[shard.first : shard.first + shard.num_local])
    if regime.layout == "packed":
        assert bool((local >= min(layer.top_k, len(here))).all())
    if regime.layout in ("deduplicated", "slot"):
        assert bool((local >= 1).all())
    if regime.layout == "pool":
        arrived = (local > 0).view(regime.ep_size, -1).int()
        assert bool((arrived.diff(dim=1) <= 0).all())
    assert routing.load.tolist() == [int((ids == shard.first + i).sum()) for i in range(shard.num_local)]
    assert bool((routing.topk_weights[ids[:, 0] >= 0] > 0).all())


@brief
@given(case=cases())
def test_routings_are_valid_and_a_function_of_their_key(case):
    layer, regime, rows, rank = case
    routing = realize(layer, regime, rows, rank)
    check_valid(layer, regime, rows, rank, routing)
    again = realize(layer, regime, rows, rank)
    assert torch.equal(again.topk_ids, routing.topk_ids)
    assert torch.equal(again.topk_weights, routing.topk_weights)
    other = realize(layer, regime, rows, rank, draw=1)
    check_valid(layer, regime, rows, rank, other)


@brief
@given(case=cases(), factor=st.sampled_from([2, 3, 4]))
def test_stress_keeps_the_experts_of_a_row_distinct(case, factor):
    layer, regime, rows, rank = case
    routing = realize(layer, regime, rows, rank)
    if not int(routing.load.max()):
        return
    stressed = stress(layer, regime, routing, rank, factor)
    experts = torch.tensor(copies_of(layer, regime))
    for row in stressed.topk_ids.tolist():
        kept = [int(experts[slot]) for slot in row if slot >= 0]
        assert len(set(kept)) == len(kept)
    assert int(stressed.load.max()) >= int(routing.load.max())


@settings(max_examples=25)
@given(
    num_experts=st.sampled_from([16, 32, 60, 128, 256, 384]),
    top_k=st.integers(1, 12),
    spelled=st.sampled_from(["ddist:1.5", "ddist:2", "ddist:4", "zipf:0.5", "zipf:1", "powerlaw:1.01", "powerlaw:1.2"]),
    view=st.sampled_from(["none", "allgather", "packed"]),
)
def test_the_asked_skew_is_in_the_drawn_ids(num_experts, top_k, spelled, view):
    """At 8192 rows the counted effective number is the law's, up to noise, and each load is the law's within noise.

    Noise makes counts more uneven: of N slots, Σ count² is larger by about N, a relative n / N of the effective number.
    The standard deviation of Σ count² / N² is at most that of independent slots, 2 √((Σ p³ − (Σ p²)²) / N).
    """
    layer = moe(num_experts, min(top_k, num_experts // 4))
    regime = regime_of(view, 2, spelled)
    ids, rows = realize(layer, regime, 8192, 0).topk_ids, 8192
    scope = len(scope_preferences(layer, regime, 0).chances)
    counts = torch.bincount(ids.flatten().long(), minlength=scope)[:scope]
    law = skew_shares(layer, regime, 0)
    total = int(counts.sum())
    found = total**2 / (
        float((counts.double() ** 2).sum()) - total * (1.0 - layer.top_k * sum(s * s for s in law.values))
    )
    squares, cubes = (sum(share**power for share in law.values) for power in (2, 3))
    noise = 5.0 * 2.0 * math.sqrt(max(cubes - squares**2, 0.0) / total) / squares
    assert found == pytest.approx(effective_experts(law.values), rel=0.01 + noise)
    if not law.missed:
        assert found == pytest.approx(law.asked_effective, rel=0.06 + noise)
    for count, share in zip(counts.tolist(), law.values, strict=True):
        chance = min(share * layer.top_k, 1.0)
        assert abs(count - rows * chance) < 6.0 * math.sqrt(rows * chance * (1.0 - chance)) + 2.0


@pytest.mark.no_cover
@pytest.mark.parametrize("redundant", [0, 32])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("spelled", SKEWED)
def test_the_expected_load_is_the_mean_of_draws(spelled, view, redundant):
    layer = moe(128, 8)
    regime = regime_of(view, 8, spelled, redundant_experts=redundant, eplb="trtllm" if redundant else None)
    for rank in (tuned_rank(layer, regime, "fullest"), 3):
        draws = [realize(layer, regime, 1024, rank, draw).load for draw in range(16)]
        mean = torch.stack(draws).double().mean(0)
        expected = expect(layer, regime, 1024, rank)
        slots = expected.local_slots
        assert float(mean.sum()) == pytest.approx(slots, rel=0.005, abs=4.0 * math.sqrt(slots / 16))
        chances = row_chances(layer, regime, rank)
        idle = [(1.0 - min(chance, 1.0)) ** 1024 for chance in chances]
        active = sum(int((load > 0).sum()) for load in draws) / len(draws)
        spread = 4.0 * math.sqrt(sum(each * (1.0 - each) for each in idle) / 16)
        assert active == pytest.approx(expected.active_experts, rel=0.005, abs=spread)
        noise = [5.0 * math.sqrt(1024 * chance / 16) + 1.0 for chance in chances]
        pairs = zip(mean.tolist(), chances, noise, strict=True)
        assert all(abs(found - 1024 * chance) < limit for found, chance, limit in pairs)


@pytest.mark.no_cover
@pytest.mark.parametrize("redundant", [0, 32])
def test_the_local_slots_of_a_token_have_their_law(redundant):
    layer = moe(128, 8)
    regime = regime_of("allgather", 8, "ddist:4", redundant_experts=redundant, eplb="vllm" if redundant else None)
    shard, law = regime.shard(layer, 5), slot_law(layer, regime, 5)
    ids = realize(layer, regime, 16384, 5).topk_ids
    local = ((ids >= shard.first) & (ids < shard.first + shard.num_local)).sum(1)
    found = (torch.bincount(local, minlength=9) / 16384).tolist()
    assert found == pytest.approx(law.probabilities, abs=0.015)
    assert sum(c * p for c, p in enumerate(law.probabilities)) == pytest.approx(sum(token_chances(layer, regime, 5)))


@pytest.mark.parametrize("spelled", ["ddist:1", "zipf:0"])
@pytest.mark.parametrize("view", VIEWS)
def test_no_skew_has_the_expected_load_of_random(spelled, view):
    layer = moe(64, 4)
    skewed, random = (expect(layer, regime_of(view, 8, each), 512) for each in (spelled, "random"))
    assert skewed.local_slots == pytest.approx(random.local_slots)
    assert skewed.hit_fraction == pytest.approx(random.hit_fraction)
    assert skewed.tokens == pytest.approx(random.tokens)
    assert skewed.active_experts == pytest.approx(random.active_experts, rel=1e-3)


@pytest.mark.parametrize("view", ["none", "allgather", "deduplicated", "slot", "pool"])
def test_the_fullest_rank_has_the_largest_share_and_mean_the_middle_one(view):
    layer, regime = moe(128, 8), regime_of(view, 8, "zipf:1")
    shares = physical_shares(layer, regime)
    loads = [sum(shares[16 * rank : 16 * rank + 16]) for rank in range(8)]
    assert tuned_rank(layer, regime, "fullest") == loads.index(max(loads))
    assert tuned_rank(layer, regime, "mean") == min(range(8), key=lambda rank: abs(loads[rank] - 1 / 8))
    assert tuned_rank(layer, regime, 3) == 3
    assert max(loads) > 1.3 / 8


def test_packed_rows_have_the_skew_of_one_rank_and_all_ranks_are_alike():
    layer, regime = moe(128, 4), regime_of("packed", 4, "ddist:2")
    assert tuned_rank(layer, regime, "fullest") == tuned_rank(layer, regime, 3) == 0
    assert skew_shares(layer, regime).asked_effective == 16.0
    first, third = realize(layer, regime, 256, 0).topk_ids, realize(layer, regime, 256, 2).topk_ids
    assert torch.equal(first + 64, third)


def test_packed_rows_with_fewer_local_experts_than_slots_have_all_of_them():
    layer = moe(128, 4)
    regime = regime_of("packed", 64, "zipf:1")
    ids = realize(layer, regime, 128, 5).topk_ids
    assert ids[:, :2].sort(1).values.tolist() == [[10, 11]] * 128
    assert not ((ids[:, 2:] >= 10) & (ids[:, 2:] < 12)).any()


@pytest.mark.parametrize("view", VIEWS)
def test_redundant_experts_take_the_load_from_the_busiest_rank(view):
    layer = moe(128, 8)
    plain = regime_of(view, 8, "ddist:4")
    placed = regime_of(view, 8, "ddist:4", redundant_experts=32, eplb="vllm")
    peaks = []
    for regime in (plain, placed):
        load = realize(layer, regime, 1024, tuned_rank(layer, regime, "fullest")).load
        peaks.append(int(load.max()) / max(1, int(load.sum())))
    assert peaks[1] < peaks[0] or view == "packed"
    if view != "packed":
        assert expect(layer, placed, 1024, tuned_rank(layer, placed, "fullest")).local_slots < (
            expect(layer, plain, 1024, tuned_rank(layer, plain, "fullest")).local_slots + 1e-9
        ) or view in ("deduplicated", "slot")


class TestGroups:
    """A router with groups keeps its own rule; biases are fitted to the asked shares."""

    @pytest.mark.parametrize("spelled", ["ddist:2", "zipf:1", "powerlaw:1.2"])
    def test_the_asked_skew_is_achieved_within_3_percent(self, spelled):
        layer, regime = deepseek_r1(), regime_of("allgather", 8, spelled)
        scope = scope_preferences(layer, regime)
        assert scope.simulated
        assert sum(scope.chances) == pytest.approx(8.0)
        asked = skew_shares(layer, regime).asked_effective
        assert effective_experts(scope.chances) == pytest.approx(asked, rel=0.03)
        counts = torch.bincount(realize(layer, regime, 4096, 0).topk_ids.flatten().long(), minlength=256)
        assert effective_experts(counts.tolist()) == pytest.approx(asked, rel=0.07)

    @pytest.mark.parametrize("view", VIEWS)
    def test_rows_obey_the_group_limit(self, view):
        layer, regime = moe(32, 4, DEEPSEEK_ROUTING), regime_of(view, 8, "zipf:1")
        routing = realize(layer, regime, 64, 1)
        check_valid(layer, regime, 64, 1, routing)
        if view not in ("packed", "slot", "pool"):
            assert all(len({slot // 4 for slot in row}) <= 4 for row in routing.topk_ids.tolist())
            assert routing.topk_weights.sum(1).tolist() == pytest.approx([2.5] * 64, rel=1e-5)


def test_the_ids_do_not_move():
    digest = hashlib.sha256()
    for view in VIEWS:
        for spelled in SKEWED:
            for redundant in (0, 8):
                eplb: Any = "vllm" if redundant else None
                regime = regime_of(view, 8, spelled, redundant_experts=redundant, eplb=eplb)
                digest.update(repr(realize(moe(64, 4), regime, 96, rank=1, draw=2).topk_ids.tolist()).encode())
    assert digest.hexdigest() == "4a45f9a76b4f914b6df2ab0d22457aadc2e5b514aaeb8b78a718dd670b5deb7a"


@pytest.mark.parametrize("redundant", [0, 4])
def test_a_rank_that_almost_no_token_reaches_has_rows_all_the_same(redundant):
    layer = moe(60, 4)
    eplb: Any = "vllm" if redundant else None
    regime = regime_of("deduplicated", 4, "zipf:8", redundant_experts=redundant, eplb=eplb)
    rank = min(range(4), key=lambda rank: slot_law(layer, regime, rank).hit_fraction)
    if not redundant:
        assert slot_law(layer, regime, rank).hit_fraction < 1e-6
    check_valid(layer, regime, 64, rank, realize(layer, regime, 64, rank))


def test_a_rank_that_almost_no_token_reaches_is_an_error_with_groups():
    layer, regime = moe(256, 2, DEEPSEEK_ROUTING), regime_of("deduplicated", 64, "zipf:8")
    rank = min(range(64), key=lambda rank: slot_law(layer, regime, rank).hit_fraction)
    with pytest.raises(UsageError, match="gets fewer than one token of 1,000, so its rows cannot be sampled"):
        realize(layer, regime, 64, rank)


@pytest.mark.parametrize("view", ["deduplicated", "slot"])
def test_a_rank_without_tokens_has_no_rows_to_expect(view):
    layer, regime = moe(128, 4), regime_of(view, 32, "zipf:4")
    rank = min(range(32), key=lambda rank: slot_law(layer, regime, rank).hit_fraction)
    for question in (lambda: expect(layer, regime, 64, rank), lambda: row_chances(layer, regime, rank)):
        with pytest.raises(UsageError, match=f"Under zipf:4 rank {rank} gets no tokens") as raised:
            question()
        assert raised.value.hint == "Choose another rank, such as --rank fullest."
    assert expect(layer, regime, 64, tuned_rank(layer, regime, "fullest")).tokens < 64
