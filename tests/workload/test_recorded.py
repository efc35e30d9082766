from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import DEEPSEEK_ROUTING, VIEWS, moe, regime_of
from test_skewed import check_valid

from moetune.errors import UsageError
from moetune.recordings.reading import read_recording
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.achieved import achieved, miss
from moetune.workload.dispatch import expect
from moetune.workload.placed import copies_of
from moetune.workload.rank_law import row_chances, scope_preferences, slot_law
from moetune.workload.ranks import tuned_rank
from moetune.workload.router import is_local
from moetune.workload.routing import realize, stress

TOKENS = 400
brief = settings(max_examples=40)


def recorded_ids(num_experts: int, top_k: int, seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    """Skewed ids, in which experts of a pair come together more often than by chance."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.arange(num_experts) // 2
    scores = (
        torch.randn(tokens, num_experts, generator=generator)
        + 1.5 * torch.randn(tokens, num_experts, generator=generator)[:, pair]
    )
    return (scores - torch.arange(num_experts) / num_experts).topk(top_k, dim=1).indices.int()


def spelled(folder: Any, ids: torch.Tensor, **more: torch.Tensor) -> str:
    path = folder / f"{len(ids)}-{ids.shape[-1]}-{int(ids.sum())}.npz"
    numpy.savez(path, topk_ids=ids.numpy(), **{name: array.numpy() for name, array in more.items()})
    return f"replay:{read_recording(path).digest}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recordings")


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, MoELayer, str, dict[str, Any], int, int]:
    """A recording, its layer, a view, the regime's other fields, rows and a rank."""
    num_experts = draw(st.sampled_from([4, 8, 16, 60, 128]))
    top_k = draw(st.integers(1, min(8, num_experts)))
    redundant = draw(st.just(0) | st.integers(1, num_experts))
    slots = num_experts + redundant
    ep_size = draw(st.sampled_from([ep for ep in range(1, min(8, slots) + 1) if slots % ep == 0]))
    view, rows = draw(st.sampled_from(list(VIEWS))), draw(st.integers(1, 64) | st.sampled_from([257, 1024]))
    if view == "pool":
        rows = max(1, rows // ep_size) * ep_size
    eplb = draw(st.sampled_from(["vllm", "sglang", "trtllm"])) if redundant else None
    routing = draw(st.sampled_from([None, DEEPSEEK_ROUTING])) if num_experts == 128 else None
    fields = {"ep_size": ep_size, "redundant_experts": redundant, "eplb": eplb, "seed": draw(st.integers(0, 1))}
    ids = recorded_ids(num_experts, top_k, draw(st.integers(0, 3)))
    return ids, moe(num_experts, top_k, routing), view, fields, rows, draw(st.integers(0, ep_size - 1))


@brief
@given(cases())
def test_rows_have_distinct_experts_and_what_the_layout_promises(folder, case):
    ids, layer, view, fields, rows, rank = case
    regime = regime_of(view, distribution=spelled(folder, ids), **fields)
    try:
        routing = realize(layer, regime, rows, rank)
    except UsageError as error:
        assert "gets no tokens" in error.message or "fewer than one token" in error.message  # noqa: PT017
        return
    check_valid(layer, regime, rows, rank, routing)
    again = realize(layer, regime, rows, rank)
    assert torch.equal(routing.topk_ids, again.topk_ids)
    assert torch.equal(routing.topk_weights, again.topk_weights)
    check_valid(layer, regime, rows, rank, stress(layer, regime, routing, rank, 2))
    if view in ("none", "allgather", "deduplicated"):  # whole tokens: each row is one of the recording
        copies = torch.tensor(copies_of(layer, regime))
        found = {tuple(row) for row in copies[routing.topk_ids.long()].tolist()}
        assert found <= {tuple(row) for row in ids.tolist()}


def test_another_seed_or_draw_or_recording_makes_other_rows(folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    regime = regime_of("none", 4, spelled(folder, ids))
    first = realize(layer, regime, 64).topk_ids
    others = [
        realize(layer, regime.model_copy(update={"seed": 1}), 64),
        realize(layer, regime, 64, draw=1),
        realize(layer, regime_of("none", 4, spelled(folder, ids.flip(0))), 64),
    ]
    assert all(not torch.equal(first, other.topk_ids) for other in others)


def test_draws_keep_the_marginal_and_the_co_selection_within_sampling_error(folder):
    layer, ids = moe(16, 4), recorded_ids(16, 4, tokens=5_000)
    rows = realize(layer, regime_of("none", 4, spelled(folder, ids)), 65_536).topk_ids

    def pairs(tokens: torch.Tensor) -> torch.Tensor:
        """The chance of each pair of experts to be in one token; on the diagonal that of each expert."""
        has = torch.zeros(len(tokens), 16, dtype=torch.float64).scatter_(1, tokens.long(), 1.0)
        return has.T @ has / len(tokens)

    wanted, found = pairs(ids), pairs(rows)
    deviation = (wanted * (1 - wanted) / len(rows)).sqrt()
    assert bool(((found - wanted).abs() < 5 * deviation + 1e-12).all())
    marginal = wanted.diagonal()
    independent = marginal.unsqueeze(0) * marginal.unsqueeze(1)
    together = wanted[range(0, 16, 2), range(1, 16, 2)] / independent[range(0, 16, 2), range(1, 16, 2)]
    assert float(together.min()) > 1.3, "the recording itself has pairs, so that losing them would be seen"


@pytest.mark.parametrize("view", ["none", "allgather", "deduplicated", "pool"])
def test_a_rank_gets_the_recorded_tokens_that_have_a_slot_there(view, folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    regime = regime_of(view, 4, spelled(folder, ids))
    for rank in range(4):
        shard = regime.shard(layer, rank)
        counts = is_local(ids, shard).sum(1)
        law = torch.bincount(counts, minlength=5).double() / len(ids)
        assert slot_law(layer, regime, rank).probabilities == pytest.approx(law.tolist())
        slots = realize(layer, regime, 4096, rank).load.sum() / 4096
        mean = counts[counts > 0] if view == "deduplicated" else counts
        assert float(slots) == pytest.approx(float(mean.double().mean()), rel=0.05)
        assert expect(layer, regime, 4096, rank).local_slots == pytest.approx(4096 * float(mean.double().mean()))


@pytest.mark.parametrize("view", ["packed", "slot", "deduplicated"])
def test_a_ranks_loads_are_the_recorded_ones(view, folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    regime = regime_of(view, 4, spelled(folder, ids))
    for rank in range(4):
        shard = regime.shard(layer, rank)
        counts = torch.bincount(ids[is_local(ids, shard)], minlength=32)[shard.first : shard.first + 8].double()
        found = realize(layer, regime, 8192, rank).load.double()
        chances = torch.tensor(row_chances(layer, regime, rank))
        assert (found / 8192).tolist() == pytest.approx(chances.tolist(), abs=0.03)
        if view != "packed":  # there the busiest expert is capped, as a row has four distinct local ones
            assert (chances / chances.sum()).tolist() == pytest.approx((counts / counts.sum()).tolist())


def test_a_balancer_places_the_copies_by_the_recorded_loads(folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    placed = regime_of("allgather", 8, spelled(folder, ids), redundant_experts=8, eplb="vllm")
    loads = torch.bincount(ids.flatten(), minlength=32)
    copies = torch.bincount(torch.tensor(copies_of(layer, placed)))
    assert int(copies[int(loads.argmax())]) > 1
    assert int(copies[int(loads.argmin())]) == 1
    plain = regime_of("allgather", 8, spelled(folder, ids))
    assert _unevenness(layer, placed) < 1.05 < _unevenness(layer, plain)


def _unevenness(layer: MoELayer, regime: Regime) -> float:
    return max(achieved(layer, regime, 64, rank).rank_load for rank in range(regime.ep_size))


def test_recorded_weights_go_with_their_ids_and_others_are_random(folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    weights = torch.rand(ids.shape)
    regime = regime_of("deduplicated", 4, spelled(folder, ids, topk_weights=weights))
    routing = realize(layer, regime, 64, 1)
    known = {(*row, *own) for row, own in zip(ids.tolist(), weights.tolist(), strict=True)}
    for row, own in zip(routing.topk_ids.tolist(), routing.topk_weights.tolist(), strict=True):
        assert (*row, *own) in known
    without = realize(layer, regime_of("deduplicated", 4, spelled(folder, ids.flip(1))), 64, 1)
    assert without.topk_weights.sum(1).tolist() == pytest.approx([1.0] * 64)


def test_the_fullest_rank_is_the_one_with_the_most_recorded_slots(folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    slots = [int(is_local(ids, Regime(ep_size=4).shard(layer, rank)).sum()) for rank in range(4)]
    regime = regime_of("allgather", 4, spelled(folder, ids))
    assert tuned_rank(layer, regime, "fullest") == slots.index(max(slots))
    assert tuned_rank(layer, regime, 3) == 3


def test_the_skew_is_that_of_the_recording(folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    regime = regime_of("allgather", 4, spelled(folder, ids))
    shares = torch.bincount(ids.flatten(), minlength=32).double() / ids.numel()
    found = achieved(layer, regime, 4096, 0)
    assert found.asked_effective_experts == pytest.approx(1 / float((shares**2).sum()))
    assert found.effective_experts == pytest.approx(found.asked_effective_experts)
    assert found.max_over_mean == pytest.approx(32 * float(shares.max()))
    assert found.drawn_max_over_mean == pytest.approx(found.rank_max_over_mean, rel=0.05)
    assert miss(layer, regime, simulate=True) is None
    assert sum(scope_preferences(layer, regime).chances) == pytest.approx(4.0)


def test_a_rank_that_the_recording_never_reaches_has_nothing_to_measure(folder):
    layer, ids = moe(32, 4), recorded_ids(16, 4)
    for view in ("deduplicated", "packed", "slot"):
        with pytest.raises(UsageError, match=r"rank 3 gets no tokens|gets fewer than one token"):
            realize(layer, regime_of(view, 4, spelled(folder, ids)), 8, 3)


def test_rows_can_be_made_from_a_path_too(folder):
    layer, ids = moe(32, 4), recorded_ids(32, 4)
    digest = spelled(folder, ids)
    (path,) = folder.glob(f"{len(ids)}-4-{int(ids.sum())}.npz")
    by_path = realize(layer, Regime(distribution=f"replay:{path}"), 64)
    assert torch.equal(by_path.topk_ids, realize(layer, Regime(distribution=digest), 64).topk_ids)
