"""Humming's tactics, and why others are left out."""

from dataclasses import replace

import pytest

from moetune.backends.device import Device
from moetune.backends.humming.config import Config
from moetune.backends.humming.formulas import estimated_slots
from moetune.backends.humming.gemm import Gemm, gemm_type, gemms
from moetune.backends.humming.search import lines
from moetune.backends.humming.space import AUTO, candidates, configs, tactic_of
from moetune.backends.marlin.formats import FORMATS
from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.spec.regime import Regime

INT4 = FORMATS[Precision.MXINT4]
KIMI = (
    Gemm(4096, 7168, 48, INT4, False, "grouped_contiguous"),
    Gemm(7168, 2048, 48, INT4, False, "grouped_contiguous"),
)
FAST = "wgmma-32x256x64-32x32x64-s4-b1-producer-streamk"
SMALL = Device(shared_bytes=90_000)


def test_sizes_are_padded_as_vllm_pads_them():
    assert gemms(preset("kimi-k2.5"), Regime(ep_size=8)) == KIMI
    first, second = gemms(preset("gpt-oss-120b"), Regime(tp_size=4))
    assert (first.columns, first.depth, first.type, first.bias) == (1440, 2880, "indexed", True)
    assert (first.padded_columns, first.padded_depth) == (1536, 2944)
    assert (second.padded_columns, second.padded_depth) == (3072, 768)


def test_ranks_that_share_experts_run_grouped_gemms():
    assert gemm_type(Regime(ep_size=2)) == gemm_type(Regime(ep_size=2, dispatch="allgather")) == "grouped_contiguous"
    assert gemm_type(Regime()) == gemm_type(Regime(tp_size=8)) == "indexed"


@pytest.mark.parametrize(
    ("changed", "spelled", "device", "reason"),
    [
        ({"columns": 128}, "wgmma-64x512x64-64x32x64-s4-b1-producer", Device(), "N = 256 is not divisible by"),
        ({"depth": 640}, "mma-8x128x256-8x64x32-s4-b1", Device(), "K = 640 is not divisible by the block's 256"),
        ({"format": replace(INT4, group=96)}, FAST, Device(), "block K = 64 and the groups of 96 do not nest"),
        ({}, "wgmma-64x256x64-48x32x64-s4-b1", Device(), "the block is not divisible by the warp"),
        ({}, "wgmma-48x256x64-16x32x64-s4-b1", Device(), "the warps along M have to be powers of two"),
        ({}, "wgmma-64x256x64-64x16x64-s4-b1", Device(), "warp N of 32 or 64"),
        ({}, "wgmma-64x64x64-64x32x64-s4-b1", Device(), "wgmma needs a multiple of 4 warps along N, has 2"),
        ({}, "wgmma-64x256x128-64x32x128-s4-b1", Device(), "wgmma takes a warp K of at most 64, has 128"),
        ({}, "wgmma-64x256x64-64x32x64-s2-b1", Device(), "wgmma needs at least 3 stages, has 2"),
        ({}, "wgmma-32x1024x64-32x32x64-s4-b1-producer", Device(), "needs 1152 threads, a block has at most 1024"),
        ({}, "mma-8x64x64-8x64x64-s4-b1-producer", Device(), "a producer needs a multiple of 4 other warps, has 1"),
        ({}, "wgmma-192x256x64-192x32x64-s4-b2-producer", Device(), "wgmma needs 128 registers a thread, has 80"),
        ({}, "mma-64x128x64-64x64x32-s4-b4", Device(), "needs 160 registers a thread for the sums"),
        ({}, "mma-8x128x128-8x64x32-s4-b8", Device(), "leaves a thread 32 registers, needs 56"),
        ({}, "wgmma-64x512x64-64x32x64-s8-b1-producer", Device(), "bytes of shared memory a block, has 232448"),
        ({}, "wgmma-64x128x64-64x32x64-s6-b2", SMALL, "of shared memory a block, has 90000"),
        ({}, "wgmma-64x256x128-64x64x64-s4-b2", Device(), "2 blocks do not fit on a multiprocessor, 1 do"),
        ({}, FAST, Device(), None),
    ],
)  # fmt: skip
def test_a_configuration_is_left_out_with_the_reason(changed, spelled, device, reason):
    found = replace(KIMI[0], **changed).obstacle(Config.parse(spelled), device)
    assert (found is None) if reason is None else reason in found


def test_the_shared_memory_is_that_of_the_package():
    """By hand from `estimate_smem_size_layer` of Humming 0.1.19; a test with the package compares all of them."""
    config = Config.parse("wgmma-64x256x64-64x32x64-s4-b1-producer-streamk-r4")
    stage = 64 * 64 * 2 + 256 * 64 // 2 + 2 * 256 * 2
    assert stage == 17 * 1024
    experts = 128 + 48 * 4 + 49 * 4 + 4 + 49 * 4
    assert KIMI[0].shared_bytes(config) == 4 * stage + 64 * 256 * 2 + 1024
    assert experts + 6 * 8 + 5 * 8 < 1024
    shared = Config.parse("wgmma-16x256x128-16x64x64-s4-b2")
    assert replace(KIMI[0], type="indexed").shared_bytes(shared) == 4 * (4096 + 16384 + 2048 + 1024 - 1024) + 1024


def test_the_default_is_first_and_pairs_of_all_that_runs_follow():
    found = candidates(KIMI, Device())
    assert found.tactics[0] == tactic_of() == tactic_of(AUTO, AUTO)
    legal = [1 + sum(gemm.obstacle(config, Device()) is None for config in configs(gemm.type)) for gemm in KIMI]
    assert len(set(found.tactics)) == len(found.tactics) == legal[0] * legal[1]
    assert {name for tactic in found.excluded for name in tactic} == {"gemm1", "gemm2"}
    assert not any(tactic in found.excluded for tactic in found.tactics)
    assert len(lines(found.tactics)) == sum(legal) - 1


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("model", ["kimi-k2.5", "gpt-oss-120b"])
@pytest.mark.parametrize("regime", [Regime(), Regime(ep_size=8), Regime(tp_size=8)], ids=["one", "EP", "TP"])
def test_every_kind_of_configuration_is_listed_for_every_format(model, precision, regime):
    layer = preset(model).model_copy(update={"precision": precision})
    for gemm in gemms(layer, regime):
        kinds = {
            (config.mma, config.producer) for config in configs(gemm.type) if gemm.obstacle(config, Device()) is None
        }
        assert kinds == {("mma", False), ("wgmma", False), ("wgmma", True)}


@pytest.mark.parametrize(
    ("regime", "rows", "slots"),
    [
        (Regime(), 100, 800),
        (Regime(tp_size=8), 100, 800),
        (Regime(ep_size=8), 100, 100),
        (Regime(ep_size=8, dispatch="allgather"), 100, 100),
        (Regime(ep_size=8, layout="packed"), 100, 800),
        (Regime(ep_size=8, layout="slot"), 100, 100),
        (Regime(ep_size=8, dispatch="allgather"), 1, 1),
    ],
    ids=["one", "TP", "EP", "all-gather", "packed", "slot", "one row"],
)
def test_the_slots_are_those_that_vllm_estimates(regime, rows, slots):
    """Kimi-K2 has k = 8; at EP 8 a rank has an eighth of the slots of all tokens."""
    assert estimated_slots(preset("kimi-k2.5"), regime, rows) == slots


def test_of_deduplicated_rows_vllm_counts_the_tokens_that_did_not_come():
    layer, regime = preset("kimi-k2.5"), Regime(ep_size=8, layout="deduplicated")
    assert 1.5 * 1000 < estimated_slots(layer, regime, 1000) < 1.6 * 1000
