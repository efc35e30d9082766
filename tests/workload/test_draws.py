"""Draws say what they are for, and their ids are those of `realize` with the same number."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import VIEWS, moe, regime_of

from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime
from moetune.workload.dispatch import expect, rows_for_tokens
from moetune.workload.draws import (
    STRESS_FACTORS,
    compared_rows,
    final_draws,
    named_parts,
    num_final,
    sampled,
    search_draws,
    side_by_side_draws,
    typical_rows,
    untouched,
)
from moetune.workload.routing import realize, stress


@pytest.mark.parametrize(
    ("bucket", "typical", "tokens"),
    [(1, 1, None), (4, 4, None), (8, 7, 1), (128, 118, 16), (512, 471, 64), (2048, 1884, 256), (8192, 7536, 1024)],
)
def test_the_roundest_number_of_tokens_gives_a_buckets_typical_rows(bucket: int, typical: int, tokens: int | None):
    """Qwen3-235B on 32 ranks: a token produces 7.36 rows; no whole number of tokens produces 1 or 4."""
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="hybrid")
    assert typical_rows(layer, regime, bucket) == typical
    if tokens:
        assert round(rows_for_tokens(layer, regime, tokens)) == typical


@settings(max_examples=60)
@given(
    st.sampled_from([view for view in VIEWS if view != "deduplicated"]),
    st.sampled_from([1, 2, 4, 8, 32]),
    st.sampled_from(["hybrid", "pow2", "vllm"]),
)
def test_typical_rows_are_the_buckets_own_if_a_token_produces_a_power_of_two_rows(view: str, ep_size: int, ladder: str):
    layer, regime = moe(64, 4), regime_of(view, ep_size, ladder=ladder)
    for bucket in regime.buckets:
        if bucket % 32 == 0 or view in ("none", "packed"):
            assert typical_rows(layer, regime, bucket) == bucket


@settings(max_examples=60)
@given(
    st.sampled_from([view for view in VIEWS if view != "pool"]),
    st.sampled_from([1, 2, 3, 6, 8, 32]),
    st.sampled_from(["hybrid", "pow2", "vllm", "3,70,900"]),
    st.integers(900, 8192),
)
def test_typical_rows_map_to_their_bucket(view: str, ep_size: int, ladder: str, maximum: int):
    layer, regime = moe(96, 4), regime_of(view, ep_size, ladder=ladder, tune_max_num_tokens=maximum)
    for bucket in regime.buckets:
        typical = typical_rows(layer, regime, bucket)
        assert regime.ladder.lookup(typical, maximum) == regime.ladder.lookup(bucket, maximum)
        if ladder == "3,70,900":
            assert typical == bucket


def test_draws_alternate_between_the_buckets_rows_and_its_typical_rows():
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="hybrid")
    draws = sampled(layer, regime, 512, typical_rows(layer, regime, 512), range(4), "search")
    assert [int((draw.routing.topk_ids >= 0).any(1).sum()) for draw in draws] == [512, 471, 512, 471]
    assert [draw.rows for draw in draws] == [512, 471, 512, 471]
    for number, routing in enumerate(draw.routing for draw in draws):
        rows = 471 if number % 2 else 512
        same = realize(layer, regime, rows, draw=number)
        assert routing.topk_ids.shape == routing.topk_weights.shape == (512, 8)
        assert torch.equal(routing.topk_ids[:rows], same.topk_ids)
        assert torch.equal(routing.topk_weights[:rows], same.topk_weights)
        assert torch.equal(routing.load, same.load)
        assert (routing.topk_ids[rows:] == -1).all()
        assert not routing.topk_weights[rows:].any()


def test_a_bucket_with_fewer_rows_than_its_typical_rows_is_padded():
    """TensorRT-LLM rounds down: 64 tokens produce 471 rows, which map to the bucket 256."""
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="pow2")
    own, typical = sampled(layer, regime, 256, typical_rows(layer, regime, 256), range(2), "search")
    assert own.routing.topk_ids.shape == typical.routing.topk_ids.shape == (471, 8)
    assert int((own.routing.topk_ids >= 0).any(1).sum()) == 256


def test_a_bucket_has_draws_of_the_search_and_of_stress():
    """Draw n has the ids that `realize` gives for the number n; stress draws are made from the first."""
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="hybrid", draws=4)
    draws = search_draws(layer, regime, 512)
    assert [draw.kind for draw in draws] == ["search"] * 4 + ["stress"] * len(STRESS_FACTORS)
    assert tuple(draw.stress_factor for draw in draws if draw.kind == "stress") == STRESS_FACTORS
    assert {draw.stress_factor for draw in draws if draw.kind != "stress"} == {None}
    for number, draw in enumerate(draws[: -len(STRESS_FACTORS)]):
        same = realize(layer, regime, draw.rows, draw=number)
        assert torch.equal(draw.routing.topk_ids[: draw.rows], same.topk_ids)
    for draw, factor in zip(draws[-len(STRESS_FACTORS) :], STRESS_FACTORS, strict=True):
        assert torch.equal(draw.routing.topk_ids, stress(layer, regime, draws[0].routing, None, factor).topk_ids)
        assert draw.rows == draws[0].rows


@pytest.mark.parametrize(("num_row_counts", "count"), [(1, 64), (3, 22), (4, 16)])
def test_the_row_counts_of_a_bucket_share_its_draws_and_none_is_one_of_the_search(num_row_counts, count):
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="hybrid", draws=16)
    draws = final_draws(layer, regime, 471, num_row_counts)
    assert [(draw.kind, draw.rows, draw.routing.topk_ids.shape) for draw in draws] == [("final", 471, (471, 8))] * count
    for number, draw in enumerate(draws):
        assert torch.equal(draw.routing.topk_ids, realize(layer, regime, 471, draw=16 + number).topk_ids)


@pytest.mark.parametrize(
    ("view", "ep_size", "ladder", "bucket", "rows"),
    [
        ("none", 1, "vllm", 1, (1,)),
        ("none", 1, "vllm", 8, (8, 7, 12)),
        ("none", 1, "vllm", 128, (128, 113, 192)),
        ("none", 1, "vllm", 4096, (4096, 3585, 4607)),
        ("allgather", 8, "hybrid", 512, (512, 257, 363)),
        ("allgather", 8, "pow2", 512, (512, 1023, 724)),
        ("deduplicated", 32, "hybrid", 512, (471, 257, 512, 348)),
        ("pool", 24, "hybrid", 256, (192, 144, 240)),
        ("pool", 24, "hybrid", 768, (768, 528)),
        ("none", 1, "3,70,900", 70, (70,)),
    ],
)
def test_a_bucket_is_compared_at_the_rows_that_stand_for_it(view, ep_size, ladder, bucket, rows):
    layer = moe(128, 8) if view == "deduplicated" else moe(384, 8)
    assert compared_rows(layer, regime_of(view, ep_size, ladder=ladder), bucket) == rows


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(VIEWS)),
    st.sampled_from([1, 2, 3, 6, 24]),
    st.sampled_from(["hybrid", "pow2", "vllm"]),
)
def test_every_row_count_that_a_bucket_is_compared_at_maps_to_it_and_can_be_sampled(view, ep_size, ladder):
    layer = moe(96, 4)
    regime = regime_of(view, ep_size, ladder=ladder, tune_max_num_tokens=300)
    for bucket in regime.buckets:
        compared = compared_rows(layer, regime, bucket)
        for lower, upper in pairwise(sorted(compared)):
            assert upper <= 1.5 * lower or not set(range(lower + 1, upper)) & set(regime.served(bucket))
        for rows in compared:
            served = regime.served(bucket)
            assert rows == bucket or rows in served
            assert len(realize(layer, regime, rows).topk_ids) == rows


@pytest.mark.no_cover
@pytest.mark.parametrize("ep_size", [6, 24, 48, 72])
@pytest.mark.parametrize("ladder", ["hybrid", "pow2"])
def test_every_pool_maps_to_a_bucket_that_is_tuned(ep_size, ladder):
    regime = regime_of("pool", ep_size, ladder=ladder)
    for tokens in range(1, 8192 // ep_size):
        assert regime.ladder.lookup(ep_size * tokens, regime.tune_max_num_tokens) in regime.buckets
    for bucket in regime.skipped_buckets:
        assert not any(rows % ep_size == 0 for rows in regime.ladder.served(bucket, regime.tune_max_num_tokens))


def test_backends_are_compared_on_draws_that_no_tune_uses():
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="hybrid", draws=2)
    tuned = (*search_draws(layer, regime, 8), *final_draws(layer, regime, 8), *final_draws(layer, regime, 7))
    used = {draw.routing.topk_ids.numpy().tobytes() for draw in tuned}
    compared = side_by_side_draws(layer, regime, 8)
    assert [(draw.kind, draw.rows) for draw in compared] == [("final", 8), ("final", 7)]
    assert not used & {draw.routing.topk_ids.numpy().tobytes() for draw in compared}


@pytest.mark.parametrize(
    ("rows", "num_local", "draws"),
    [
        (4, 32, 64),
        (128, 32, 32),
        (512, 32, 16),
        (8192, 32, 16),
        (512, 16, 32),
        (512, 4, 64),
        (2048, 4, 32),
        (8192, 4, 16),
    ],
)
def test_a_final_comparison_has_more_draws_if_each_has_few_rows_or_experts(rows, num_local, draws):
    assert num_final(16, rows, num_local) == draws
    assert num_final(1, rows, num_local) in (1, 2, 4)
    assert untouched(16).start >= 16 + num_final(16, rows, num_local)
    assert len(untouched(16)) == 16


QWEN = preset("qwen3-235b-a22b")


@pytest.mark.parametrize(
    ("ep_size", "ladder", "rows"),
    [
        (8, None, (512, 2048, 128, 32)),
        (16, [1024], (256, 1024, 64, 16)),
        (4, [16], (4, 16)),
        (3, [100], (24, 99, 6, 3)),
    ],
)
def test_the_batched_layout_is_compared_at_steps_of_several_sizes(ep_size, ladder, rows):
    regime = Regime(ep_size=ep_size, layout="batched", **({} if ladder is None else {"ladder": ladder}))
    layer = QWEN.model_copy(update={"num_experts": 96}) if ep_size == 3 else QWEN
    assert regime.buckets == (regime.capacity,)
    assert compared_rows(layer, regime, regime.capacity) == rows
    assert typical_rows(layer, regime, regime.capacity) == rows[0]


@pytest.mark.parametrize("distribution", ["random", "balanced", "zipf:0.5"])
def test_search_draws_of_the_batched_layout_have_every_row_count_and_fit_the_buffer(distribution):
    regime = Regime(ep_size=8, layout="batched", distribution=distribution, draws=8)
    draws = search_draws(QWEN, regime, 2048)
    assert [draw.rows for draw in draws] == [512, 2048, 128, 32] * 2 + [512] * 3
    for draw in draws:
        assert draw.routing.topk_ids.shape == (2048, QWEN.top_k)
        assert int((draw.routing.topk_ids[:, 0] >= 0).sum()) == draw.rows
        assert 0 < int(draw.routing.load.max()) <= draw.rows <= regime.capacity
    expected = expect(QWEN, regime, 2048)
    assert expected.tokens == 256
    assert int(draws[1].routing.load.sum()) == pytest.approx(expected.local_slots, rel=0.1)


def test_draws_of_several_distributions_are_those_of_each_alone_in_turn_and_of_one_shape():
    layer = moe(128, 8)
    regime = regime_of("deduplicated", 32, ladder="hybrid", draws=4).model_copy(
        update={"also": ("ddist:4=0.25",), "objective": "mean"}
    )
    draws = search_draws(layer, regime, 512)
    assert len({draw.routing.topk_ids.shape for draw in draws}) == 1
    search = [draw for draw in draws if draw.kind == "search"]
    assert [draw.distribution for draw in search] == ["random", "ddist:4"] * 2
    assert [draw.distribution for draw in draws if draw.kind == "stress"] == ["random"] * len(STRESS_FACTORS)
    for name, part in named_parts(regime).items():
        mine = [draw for draw in search if draw.distribution == name]
        for number, draw in enumerate(mine):
            rows = 512 if number % 2 == 0 else typical_rows(layer, part, 512)
            assert draw.rows == rows
            alone = realize(layer, part, rows, None, number)
            assert draw.routing.topk_ids[:rows].tolist() == alone.topk_ids.tolist()
    assert named_parts(Regime(ep_size=8)).keys() == {""}


def test_a_comparison_of_backends_has_draws_of_each_distribution_by_its_weight():
    layer = moe(128, 8)
    regime = Regime(ep_size=8, dispatch="allgather", ladder="64", draws=8, also=("zipf:1=0.25", "balanced=0.01"))
    draws = side_by_side_draws(layer, regime, 64)
    assert Counter(draw.distribution for draw in draws) == {"random": 6, "zipf:1": 2, "balanced": 1}
