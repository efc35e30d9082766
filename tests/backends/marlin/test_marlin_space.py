"""Marlin's tactics, and why others are left out."""

import pytest

from moetune.backends.device import Device
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.formulas import BLOCK_SIZES_M
from moetune.backends.marlin.search import marlin_search
from moetune.backends.marlin.space import AUTO, Gemm, Tile, candidates, gemms, tactic_of, tiles
from moetune.inputs.presets import layer as preset
from moetune.search.base import Batch
from moetune.spec.enums import Precision
from moetune.spec.regime import Regime

KIMI = (Gemm(4096, 7168, 32), Gemm(7168, 2048, 32))


def test_sizes_are_padded_as_vllm_pads_them():
    assert gemms(preset("kimi-k2.5"), Regime(ep_size=8), FORMATS[Precision.MXINT4]) == KIMI
    oss = gemms(preset("gpt-oss-120b"), Regime(ep_size=4), FORMATS[Precision.MXFP4])
    assert oss == (Gemm(2 * 2944, 3072, 32), Gemm(3072, 2944, 32))
    assert FORMATS[Precision.MXINT4].padded(2880, 2880) is None
    assert FORMATS[Precision.MXINT4].padded(2048, 96) == (2048, 128)
    assert FORMATS[Precision.INT4_G128].padded(2048, 192) is None
    assert FORMATS[Precision.NVFP4].padded(2880, 720) == (2880, 768)
    assert FORMATS[Precision.NVFP4].padded(2048, 720) == (2048, 768)


def test_the_default_is_first_and_every_block_size_has_the_kernels_own_tiles():
    found = candidates(KIMI, tactic_of(16), Device())
    assert found.tactics[0] == tactic_of(16)
    assert {tactic_of(size) for size in BLOCK_SIZES_M} <= set(found.tactics)
    assert len(set(found.tactics)) == len(found.tactics) == 2 * 8 * 8 + 3 * 6 * 6
    assert not any(tactic in found.excluded for tactic in found.tactics)


@pytest.mark.parametrize(
    ("gemm", "block_size_m", "tile", "device", "reason"),
    [
        (Gemm(192, 256, 32), 8, Tile(128, 128, 1), Device(), "N = 192 is not divisible by thread_n = 128"),
        (Gemm(256, 192, 32), 8, Tile(128, 128, 1), Device(), "K = 192 is not divisible by thread_k = 128"),
        (KIMI[0], 32, Tile(128, 128, 1), Device(), "vLLM compiles no kernel of 128x128 for block_size_m = 32"),
        (KIMI[0], 16, Tile(64, 256, 1), Device(), "vLLM compiles no kernel of 64x256 for block_size_m = 16"),
        (KIMI[0], 64, Tile(128, 64, 1), Device(80_000), "needs 84992 bytes of shared memory a block, has 80000"),
        (KIMI[0], 64, Tile(128, 64, 2), Device(170_000), "needs 84992 bytes of shared memory a block, has 83976"),
        (KIMI[0], 16, Tile(64, 128, 4), Device(), "needs 81920 registers a multiprocessor, has 65280"),
        (KIMI[0], 16, Tile(64, 128, 3), Device(), None),
    ],
)
def test_a_tile_is_left_out_with_the_reason(gemm, block_size_m, tile, device, reason):
    assert gemm.obstacle(block_size_m, tile, device) == reason


def test_an_excluded_tile_is_named_with_its_gemm_and_block_size():
    found = candidates(KIMI, tactic_of(8), Device())
    named = {(tactic["block_size_m"], *(set(tactic) - {"block_size_m"})) for tactic in found.excluded}
    assert named == {(size, name) for size in BLOCK_SIZES_M for name in ("gemm1", "gemm2")}


def test_the_shared_memory_is_that_of_the_op():
    """By hand from `get_kernel_cache_size`: 16 rows, thread_k 64, thread_n 128, 4 stages, groups of 32."""
    weights, inputs, scales, rows = 4 * 64 * 128 // 2, 4 * 16 * 64 * 2, 2 * 128 * 2 * 4, 16 * 16
    assert Gemm(4096, 7168, 32).shared_bytes(16, Tile(64, 128, 1)) == weights + inputs + scales + rows == 26_880
    # 64 rows, thread_n 64: the reduced outputs, 64·72·2 bytes, fit into the weights' 16 KiB
    assert Gemm(4096, 7168, 128).shared_bytes(64, Tile(128, 64, 1)) == 16_384 + 65_536 + 512 + 1_024


def test_a_tile_is_spelled_and_read():
    for tile in tiles():
        assert Tile.parse(str(tile)) == tile
    assert str(Tile(64, 128, 2)) == "64x128x2"
    assert Tile(64, 128, 2).threads == 128


def planted(tactic):
    """A time: a term of the block size, and one of each tile."""
    term = {AUTO: 10.0, "128x128x1": 12.0, "128x128x2": 8.0, "64x128x3": 7.0, "128x64x3": 6.5}
    size = {8: 5.0, 16: 6.0, 32: 30.0, 48: 40.0, 64: 60.0}[tactic["block_size_m"]]
    return size + term.get(tactic["gemm1"], 15.0) + term.get(tactic["gemm2"], 14.0)


@pytest.mark.parametrize("starts", [(), (tactic_of(16, "128x64x3", "128x64x3"), tactic_of(64, "9x9x9"))])
def test_the_search_finds_the_best_tiles_in_few_timings(starts):
    tactics = candidates(KIMI, tactic_of(8), Device()).tactics
    search, timed = marlin_search(tactics, starts), []
    batch = next(search)
    try:
        while True:
            assert isinstance(batch, Batch)
            assert set(batch.tactics) <= set(tactics)
            timed += batch.tactics
            batch = search.send({tactic: planted(tactic) for tactic in batch.tactics})
    except StopIteration as end:
        finalists = end.value
    assert finalists[0] == min(tactics, key=planted) == tactic_of(8, "128x64x3", "128x64x3")
    assert len(timed) < 80 < len(tactics)
    assert len(finalists) == 6


def test_the_search_goes_on_without_tactics_that_fail():
    tactics = candidates(KIMI, tactic_of(8), Device()).tactics
    search = marlin_search(tactics)
    batch = next(search)
    assert set(batch.tactics) == {tactic_of(size) for size in BLOCK_SIZES_M}
    with pytest.raises(StopIteration) as end:
        search.send({})
    assert end.value.value == ()
    search = marlin_search(tactics)
    next(search)
    batch = search.send({tactic_of(64): 9.0})
    assert {tactic["block_size_m"] for tactic in batch.tactics} == {64}
    batch = search.send({})
    assert batch.tactics == (tactic_of(64),)
    with pytest.raises(StopIteration) as end:
        search.send({tactic_of(64): 9.0})
    assert end.value.value == (tactic_of(64),)
