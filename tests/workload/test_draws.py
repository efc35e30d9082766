"""Draws say what they are for, and their ids are those of `realize` with the same number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import VIEWS, moe, regime_of

from moetune.workload.dispatch import rows_for_tokens
from moetune.workload.draws import (
    STRESS_FACTORS,
    bucket_draws,
    num_final,
    sampled,
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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
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


def test_a_bucket_has_draws_of_the_search_the_final_comparison_and_stress():
    """Draw n has the ids that `realize` gives for the number n; stress draws are made from the first."""
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="hybrid", draws=4)
    draws = bucket_draws(layer, regime, 512, 471)
    kinds = ["search"] * 4 + ["final"] * num_final(4, 512, 4) + ["stress"] * len(STRESS_FACTORS)
    assert [draw.kind for draw in draws] == kinds
    assert tuple(draw.stress_factor for draw in draws if draw.kind == "stress") == STRESS_FACTORS
    assert {draw.stress_factor for draw in draws if draw.kind != "stress"} == {None}
    for number, draw in enumerate(draws[: -len(STRESS_FACTORS)]):
        same = realize(layer, regime, draw.rows, draw=number)
        assert torch.equal(draw.routing.topk_ids[: draw.rows], same.topk_ids)
    for draw, factor in zip(draws[-len(STRESS_FACTORS) :], STRESS_FACTORS, strict=True):
        assert torch.equal(draw.routing.topk_ids, stress(layer, regime, draws[0].routing, None, factor).topk_ids)
        assert draw.rows == draws[0].rows


def test_backends_are_compared_on_draws_that_no_tune_uses():
    layer, regime = moe(128, 8), regime_of("deduplicated", 32, ladder="hybrid", draws=2)
    tuned = {draw.routing.topk_ids.numpy().tobytes() for draw in bucket_draws(layer, regime, 8, 7)}
    compared = side_by_side_draws(layer, regime, 8)
    assert [(draw.kind, draw.rows) for draw in compared] == [("final", 8), ("final", 7)]
    assert not tuned & {draw.routing.topk_ids.numpy().tobytes() for draw in compared}


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
