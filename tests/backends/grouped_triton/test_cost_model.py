from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import H200

from moetune.backends.grouped_triton.cost_model import Gemm, Tile, predicted_us

GEMM = Gemm(N=3072, K=4096, value_bytes=2)
SMALL = Tile(16, 64, 128, 4, 3, 61440, 8, wgmma=False)
LARGE = Tile(128, 256, 64, 8, 4, 196608, 128, wgmma=True)
loads = st.lists(st.lists(st.integers(0, 600), min_size=16, max_size=16), min_size=1, max_size=4)


def test_padding_waste_makes_a_large_tile_slow_for_few_slots_and_a_small_one_for_many():
    few, many = [[1] * 16], [[2048] * 16]
    assert predicted_us(H200, GEMM, SMALL, few) < predicted_us(H200, GEMM, LARGE, few)
    assert predicted_us(H200, GEMM, LARGE, many) < predicted_us(H200, GEMM, SMALL, many)


@given(loads)
def test_no_slots_anywhere_cost_no_more_than_some(slots):
    nothing = [[0] * 16]
    assert 0 < predicted_us(H200, GEMM, SMALL, nothing) <= predicted_us(H200, GEMM, SMALL, slots)


@given(loads, st.sampled_from(["dram_bytes_per_us", "l2_bytes_per_us", "bf16_flops_per_us"]))
def test_a_machine_with_a_higher_rate_is_never_slower(slots, rate):
    faster = replace(H200, **{rate: 2 * getattr(H200, rate)})
    for tile in (SMALL, LARGE):
        assert predicted_us(faster, GEMM, tile, slots) <= predicted_us(H200, GEMM, tile, slots)


def test_few_tiles_need_deep_pipelines_to_keep_the_memory_busy():
    deep = replace(SMALL, buffers=4, shared_bytes=81920)
    assert predicted_us(H200, GEMM, deep, [[1] + [0] * 15]) < predicted_us(H200, GEMM, SMALL, [[1] + [0] * 15])


def test_the_weights_of_active_experts_take_at_least_their_time_in_dram():
    read_us = 16 * GEMM.N * GEMM.K * 2 / H200.dram_bytes_per_us
    assert predicted_us(H200, GEMM, SMALL, [[1] * 16]) > read_us


def test_spilling_accumulators_cost():
    spilling = replace(LARGE, accumulators=256)
    assert predicted_us(H200, GEMM, spilling, [[512] * 16]) > 2 * predicted_us(H200, GEMM, LARGE, [[512] * 16])


@pytest.mark.parametrize("tile", [SMALL, LARGE])
def test_the_time_is_that_of_the_mean_draw(tile):
    once = predicted_us(H200, GEMM, tile, [[5] * 16])
    assert predicted_us(H200, GEMM, tile, [[5] * 16] * 3) == pytest.approx(once)
