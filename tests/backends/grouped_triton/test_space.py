"""The configurations and their legality, on an H200's limits."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.backends.grouped_triton.defaults import default_config, engine_default
from moetune.backends.grouped_triton.space import (
    VALUES,
    Limits,
    Shapes,
    accumulator_registers,
    candidates,
    idle_warps,
    illegal,
    max_padded_slots,
    shared_bytes,
    swaps_operands,
)
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

H200 = Limits((9, 0), 232448, 255, 65536)
R1 = {"hidden_size": 7168, "intermediate_size": 2048, "num_local": 32, "num_experts": 256, "fp8": True}
QWEN = {"hidden_size": 4096, "intermediate_size": 1536, "num_local": 16, "num_experts": 128, "fp8": False}


def tactic(*values):
    return Tactic(dict(zip(VALUES, values, strict=True)))


def found_for(layer, rows, top_k=8, limits=H200, **options):
    shapes = Shapes(rows=rows, top_k=top_k, **layer)
    return candidates(shapes, limits, engine_default(shapes), **{"zero_remote": False, **options})


def test_the_space_has_1920_configurations():
    assert math.prod(map(len, VALUES.values())) == 1920


@pytest.mark.no_cover
@pytest.mark.parametrize("rows", [1, 16, 256, 8192])
@pytest.mark.parametrize("layer", [R1, QWEN])
def test_every_configuration_is_a_candidate_or_excluded_with_a_reason(layer, rows):
    found = found_for(layer, rows)
    assert len({*found.tactics, *found.excluded}) == len(found.tactics) + len(found.excluded) == 1920
    assert all(found.excluded.values())


@settings(max_examples=40)
@given(st.integers(1, 8192), st.sampled_from([R1, QWEN]), st.booleans())
def test_the_default_is_the_first_candidate(rows, layer, zero_remote):
    found = found_for(layer, rows, zero_remote=zero_remote)
    assert found.tactics[0] == default_config(rows, layer["num_local"], layer["fp8"])


def test_fp8_leaves_one_of_the_two_block_sizes_that_are_clamped_to_128():
    found = found_for(R1, 8192)
    assert {candidate["BLOCK_SIZE_K"] for candidate in found.tactics} == {64, 128}
    legal = {each for each in found.excluded if found.excluded[each].startswith("runs the same")}
    assert all(each["BLOCK_SIZE_K"] == 256 for each in legal)


def test_sglangs_kernel_refuses_a_block_past_the_scale_block():
    found = found_for(R1, 8192, clamps_k=False)
    reasons = {reason for each, reason in found.excluded.items() if each["BLOCK_SIZE_K"] == 256}
    assert len(reasons) == 1
    assert "scale block of 128" in reasons.pop()


def test_group_sizes_past_the_number_of_blocks_are_merged():
    """Four rows of R1 at k 8 make at most 32 blocks."""
    groups = {each["GROUP_SIZE_M"] for each in found_for(R1, 4).tactics}
    assert groups == {1, 16, 32}
    assert {each["GROUP_SIZE_M"] for each in found_for(R1, 1, top_k=1).tactics} == {1}
    assert {each["GROUP_SIZE_M"] for each in found_for(R1, 8192).tactics} == {1, 16, 32, 64}


def test_without_a_device_only_what_no_device_could_use_is_excluded():
    anywhere, here = found_for(QWEN, 8192, limits=None), found_for(QWEN, 8192)
    assert set(here.tactics) < set(anywhere.tactics)
    assert all("MMA tiles" in reason for reason in anywhere.excluded.values())


@pytest.mark.parametrize(
    ("values", "fp8", "bytes_"),
    [  # as Triton 3.6 compiles them for sm_90, fp8 less its buffers for the scales
        ((16, 64, 128, 1, 4, 4), False, 61440),
        ((64, 128, 64, 1, 8, 3), False, 73728),
        ((128, 128, 64, 16, 8, 3), False, 98304),
        ((16, 128, 128, 1, 4, 3), True, 55296),
        ((64, 128, 128, 32, 4, 3), True, 73728),
        ((64, 32, 128, 1, 4, 5), True, 61440),
    ],
)
def test_shared_memory_is_what_triton_takes(values, fp8, bytes_):
    assert shared_bytes(tactic(*values), fp8, (9, 0)) == bytes_


def test_what_does_not_fit_is_excluded_by_the_device_at_hand():
    large = tactic(128, 256, 64, 1, 8, 5)
    assert "245760 bytes of shared memory, a block may have 232448" in illegal(large, False, H200)
    assert illegal(large, False, Limits((9, 0), 262144, 255, 65536)) is None
    assert "166" not in (illegal(tactic(64, 64, 64, 1, 4, 3), False, Limits((8, 0), 166912, 255, 65536)) or "")


def test_accumulators_must_fit_into_registers():
    assert accumulator_registers(tactic(128, 128, 64, 1, 4, 2), False) == 128
    assert accumulator_registers(tactic(128, 128, 64, 1, 4, 2), True) == 256
    assert "256 registers a thread" in illegal(tactic(128, 128, 64, 1, 4, 2), True, H200)
    assert illegal(tactic(128, 128, 64, 1, 8, 2), True, H200) is None
    assert "a thread may have 128" in illegal(tactic(256, 128, 64, 1, 8, 2), True, Limits((9, 0), 232448, 255, 32768))


def test_eight_warps_need_eight_mma_tiles():
    assert "4 MMA tiles" in idle_warps(tactic(16, 32, 64, 1, 8, 2))
    assert idle_warps(tactic(16, 32, 64, 1, 4, 2)) is None
    assert idle_warps(tactic(32, 32, 64, 1, 8, 2)) is None


def test_operands_are_swapped_for_small_fp8_tiles_on_hopper_only():
    small = tactic(32, 64, 128, 1, 4, 2)
    assert swaps_operands(small, True, (9, 0))
    assert not swaps_operands(small, False, (9, 0))
    assert not swaps_operands(small, True, (10, 0))
    assert not swaps_operands(tactic(64, 64, 128, 1, 4, 2), True, (9, 0))
    assert not swaps_operands(tactic(32, 32, 128, 1, 4, 2), True, (9, 0))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.sampled_from(VALUES["BLOCK_SIZE_M"]))
def test_no_load_needs_more_slots_than_the_bound(loads, block_size):
    padded = sum(-(-load // block_size) * block_size for load in loads)
    assert padded <= max_padded_slots(sum(loads), len(loads), block_size)


@pytest.mark.parametrize(
    ("rows", "fp8", "values"),
    [  # vLLM 0.33.0's get_default_config(rows, E=16, …) and with block_shape [128, 128]
        (1, False, (16, 64, 128, 1, 4, 4)),
        (33, False, (32, 64, 128, 1, 4, 3)),
        (65, False, (32, 128, 64, 1, 4, 3)),
        (128, False, (64, 128, 64, 1, 4, 3)),
        (512, False, (64, 128, 64, 1, 8, 3)),
        (2064, False, (128, 128, 64, 16, 8, 3)),
        (4, True, (16, 64, 128, 1, 4, 4)),
        (8, True, (16, 64, 128, 1, 4, 3)),
        (9, True, (16, 128, 128, 1, 4, 3)),
        (16, True, (16, 128, 128, 1, 4, 3)),
        (64, True, (16, 128, 128, 32, 4, 3)),
        (65, True, (64, 128, 128, 32, 4, 3)),
    ],
)
def test_the_default_is_vllms(rows, fp8, values):
    assert default_config(rows, 16, fp8) == tactic(*values)


def test_slots_are_sorted_unless_they_are_few_and_all_local():
    whole = {**QWEN, "num_local": 128}
    assert not Shapes(rows=4, top_k=8, **whole).sorted
    assert Shapes(rows=5, top_k=8, **whole).sorted
    assert Shapes(rows=1, top_k=8, **QWEN).sorted


def test_sglang_sorts_every_load_and_bounds_the_grid_by_its_local_experts():
    layer, regime = MoELayer(num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1536), Regime()
    assert not Shapes.of(layer, regime, 1).sorted
    assert Shapes.of(layer, regime, 1, kernel="sglang").sorted
    sharded = Regime(ep_size=8)
    assert Shapes.of(layer, sharded, 1, kernel="vllm").num_groups(zero_remote=True) == 128
    assert Shapes.of(layer, sharded, 1, kernel="sglang").num_groups(zero_remote=True) == 17


@pytest.mark.parametrize(
    ("rows", "fp8", "values"),
    [  # SGLang 0.5.23's get_default_config(rows, E=16, …) and with block_shape [128, 128]
        (16, False, (16, 32, 64, 1, 4, 3)),
        (17, False, (64, 64, 32, 8, 4, 3)),
        (1, True, (64, 128, 128, 32, 4, 3)),
        (2064, True, (64, 128, 128, 32, 4, 3)),
    ],
)
def test_the_default_of_sglangs_kernel_is_sglangs(rows, fp8, values):
    shapes = Shapes(rows=rows, top_k=8, **{**QWEN, "fp8": fp8}, sglang=True)
    assert engine_default(shapes) == tactic(*values)
    found = candidates(shapes, H200, engine_default(shapes), zero_remote=True, clamps_k=False)
    assert found.tactics[0] == tactic(*values)
