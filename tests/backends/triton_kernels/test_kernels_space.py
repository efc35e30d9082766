"""The flags that matmul_ogs runs on Hopper, and the reasons for those that are left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.backends.device import Device
from moetune.backends.triton_kernels import space
from moetune.backends.triton_kernels.formulas import engine_flags
from moetune.backends.triton_kernels.space import Flags, Gemm, candidates, gemms, tactic_of
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime

GPT_OSS = preset("gpt-oss-120b")


def listed(rows, regime=None, layer=GPT_OSS):
    regime = regime or Regime(ep_size=8, dispatch="allgather")
    flags = engine_flags(rows * layer.top_k, regime.shard(layer).num_local)
    return candidates(gemms(layer, regime, rows), tactic_of(flags, flags), Device())


def test_gpt_oss_has_these_flags():
    """H = I = 2880: in tiles of 64 without a rest, and 256 would read the scales of the next column."""
    found = listed(512)
    for name in ("gemm1", "gemm2"):
        values = {Flags.parse(str(tactic[name])) for tactic in found.tactics}
        assert {flags.block_m for flags in values} == {16, 32, 64, 128}
        assert {flags.block_k for flags in values} == {64, 128}
        assert {flags.num_stages for flags in values} == {2, 3, 4, 6}
        assert {flags.split_k for flags in values} == {1}
        assert Flags(128, 128, 6, 1) not in values
        assert len(values) == 4 * 2 * 4 - 1
    assert len(found.tactics) == 31 * 31
    assert set(found.tactics).isdisjoint(found.excluded)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (Flags(16, 256, 2, 1), "reads scales beyond those of K = 2880, which the engine pads to 2944 (vLLM #47910)"),
        (Flags(128, 128, 6, 1), "needs 283648 bytes of shared memory a block, has 232448"),
        (Flags(16, 128, 4, 2), "enough blocks for the device with K in 1 part"),
    ],
)
def test_what_is_left_out_has_a_reason(flags, reason):
    excluded = listed(512).excluded
    (found,) = [why for tactic, why in excluded.items() if dict(tactic) == {"gemm2": str(flags)}]
    assert reason in found


def test_a_block_of_256_along_k_is_left_in_where_it_ends_with_the_scales():
    gemm = Gemm(512, 5760, 3072)
    assert gemm.obstacle(Flags(16, 256, 3, 1), Device()) is None
    assert Gemm(512, 5760, 2944).obstacle(Flags(16, 256, 3, 1), Device()) is not None


def test_k_is_split_for_few_rows_only():
    def splits(rows):
        values = (Flags.parse(str(tactic["gemm2"])) for tactic in listed(rows).tactics)
        return {flags.split_k for flags in values if flags.block_m == 16}

    assert splits(1) == {1, 2, 4}
    assert splits(16) == {1, 2}, "64 slots are 4 blocks of 16, each with 12 of 256 columns"
    assert splits(64) == {1}


@pytest.mark.parametrize(
    ("flags", "measured"),
    [
        (Flags(16, 128, 4, 1), 68_608), (Flags(16, 128, 6, 1), 111_616), (Flags(32, 128, 4, 1), 84_992),
        (Flags(64, 128, 4, 1), 117_760), (Flags(128, 128, 4, 1), 183_296), (Flags(128, 128, 6, 1), 283_648),
        (Flags(16, 256, 4, 1), 137_216),
    ],
)  # fmt: skip
def test_shared_memory_is_what_triton_takes(flags, measured):
    """Of the first GEMM of gpt-oss, compiled by Triton 3.6.0 for compute capability 9.0."""
    assert flags.shared_bytes == measured


def test_shared_memory_for_blocks_of_64_along_k_is_at_most_this():
    for flags, measured in (
        (Flags(16, 64, 4, 1), 33_280),
        (Flags(64, 64, 6, 1), 90_624),
        (Flags(128, 64, 6, 1), 139_776),
    ):
        assert measured <= flags.shared_bytes <= 1.1 * measured


@given(st.sampled_from(space.BLOCK_SIZES_M), st.sampled_from(space.BLOCK_SIZES_K), st.integers(2, 6), st.integers(1, 4))
def test_a_spelling_is_read_back(block_m, block_k, stages, split_k):
    flags = Flags(block_m, block_k, stages, split_k)
    assert Flags.parse(str(flags)) == flags
    assert flags.constraints == {"block_m": block_m, "block_k": block_k, "num_stages": stages, "split_k": split_k}


@given(st.integers(1, 65_536), st.sampled_from([1, 4, 8, 32, 128]))
def test_the_engines_flags_are_always_candidates(rows, ep):
    regime = Regime(ep_size=ep, dispatch="allgather" if ep > 1 else "none")
    flags = engine_flags(rows * GPT_OSS.top_k, GPT_OSS.num_experts // ep)
    assert [gemm.obstacle(flags, Device()) for gemm in gemms(GPT_OSS, regime, rows)] == [None, None]


@pytest.mark.parametrize(
    ("rows", "ep4", "ep8"),
    [(16, 16, 16), (64, 16, 16), (128, 16, 32), (256, 32, 64), (512, 64, 128), (1024, 128, 128)],
)
def test_the_formula_takes_blocks_that_are_too_large_by_the_number_of_ranks(rows, ep4, ep8):
    """A mean expert of gpt-oss-120b has 4·rows/128 slots under all-gather: 32 of 1024 rows."""
    assert [engine_flags(4 * rows, 128 // ep).block_m for ep in (4, 8)] == [ep4, ep8]
