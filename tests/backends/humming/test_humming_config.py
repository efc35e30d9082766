"""The spelling of a configuration of Humming, and the fields that Humming reads."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.backends.humming.config import Config
from moetune.backends.humming.space import configs

sizes = st.sampled_from([8, 16, 24, 32, 64, 128, 256])
shapes = st.tuples(sizes, sizes, sizes)
any_config = st.builds(
    Config,
    st.sampled_from(["mma", "wgmma"]),
    shapes,
    shapes,
    st.integers(2, 8),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 4, 8]),
)


@given(any_config)
def test_a_spelling_is_read_as_it_was_written(config):
    assert Config.parse(str(config)) == config


def test_the_listed_configurations_have_different_spellings():
    for gemm_type in ("indexed", "grouped_contiguous"):
        spelled = [str(config) for config in configs(gemm_type)]
        assert len(set(spelled)) == len(spelled)
        assert all("-r" not in each for each in spelled) == (gemm_type == "indexed")


@pytest.mark.parametrize(
    "spelled",
    [
        "auto",
        "",
        "wgmma-64x256x64",
        "umma-64x256x64-64x32x64-s4-b1",
        "wgmma-64x256-64x32x64-s4-b1",
        "wgmma-64x256x64-64x32x64-s4-b1-streamk-producer",
        "wgmma-64x256x64-64x32x64-s4-b1-r1",
        "wgmma-64x256x64-64x32x64-4-1",
        "wgmma-64x256x64-64x32x64-s4-b1-tma",
    ],
)
def test_another_spelling_is_refused(spelled):
    with pytest.raises(ValueError, match="is no configuration such as"):
        Config.parse(spelled)


def test_the_fields_are_those_that_hummings_heuristic_gives_such_a_kernel():
    """As `get_heuristics_config` of Humming 0.1.19 returns them for Kimi-K2's first GEMM at EP 8 on an H200."""
    producer = Config.parse("wgmma-96x256x64-96x32x64-s4-b1-producer-streamk").fields("indexed")
    assert producer == {
        "mma_type": "wgmma",
        "block_shape": [96, 256, 64],
        "warp_shape": [96, 32, 64],
        "num_stages": 4,
        "num_ctas_per_sm": 1,
        "use_warp_spec": True,
        "use_tma": True,
        "use_stream_k": True,
        "smem_reuse_mode": "none",
        "producer_stage_unroll": 1,
        "wgmma_split_issue_wait": True,
        "raster_group_m": 1,
        "use_tma_a": False,
        "use_tma_c": False,
        "use_tma_as": False,
        "use_tma_as2": False,
    }
    small = Config.parse("mma-8x128x64-8x64x32-s4-b4-streamk").fields("grouped_contiguous")
    assert not {"use_tma_a", "smem_reuse_mode", "wgmma_split_issue_wait"} & set(small)
    assert json.loads(json.dumps(small)) == small


def test_threads_and_warps():
    config = Config.parse("wgmma-64x512x64-64x32x64-s4-b1-producer")
    assert (config.math_warps, config.threads) == (16, 640)
    assert Config.parse("mma-16x128x128-16x64x32-s4-b1").threads == 2 * 4 * 32
