import json
from dataclasses import replace
from pathlib import Path

import pytest
from flashinfer_profiles import profile
from trtllm_reader import Call, Reader

from moetune.errors import UnsupportedError, UsageError
from moetune.export import export as exported
from moetune.export.base import FOLDER
from moetune.export.trtllm import export, lookups
from moetune.export.trtllm_keys import RUNNERS
from moetune.inputs.presets import preset
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime

GOLDEN = Path(__file__).parent / "golden" / "trtllm-nvfp4-ep2.json"
BACKEND = "flashinfer-trtllm-routed"
R1 = MoELayer(**{**dict(preset("deepseek-r1")), "precision": "nvfp4"})
GPT_OSS = preset("gpt-oss-120b")
SMALL = MoELayer(num_experts=16, top_k=2, hidden_size=512, intermediate_size=256, precision="nvfp4")
DEP8 = Regime(ep_size=8, attention_dp=True, ladder="pow2/8")
PURE_EP8 = Regime(ep_size=8)


def made(layer, regime, activations=None, backend=BACKEND):
    result = profile(backend, regime, layer)
    if activations is None:
        return result
    strict = {**result.environment.strict, **activations}
    return result.model_copy(update={"environment": result.environment.model_copy(update={"strict": strict})})


def text_of(profile):
    ((_, text),) = export(profile).files.items()
    return text


def r1_nvfp4(rows, ids, local=32):
    """`fp4_block_scale_moe_runner` on DeepSeek-R1, `local` experts on a rank."""
    logits, bias = (0,), (0,)
    chosen = ((rows, 8), (rows, 8))
    if not ids:
        logits, bias, chosen = (rows, 256), (256,), ((0,), (0,))
    shapes = (
        logits, bias, (rows, 3584), (rows * 448,),
        (local, 4096, 3584), (local, 4096, 448), (0,), (0,), (0,), (0,),
        (local, 7168, 1024), (local, 7168, 128), (0,), (local,), (local,), (local,), *chosen,
    )  # fmt: skip
    derived = ((3, 0), (0, 0), (16, 0), (17, 0))
    return Call("trtllm::fp4_block_scale_moe_runner", "FP4BlockScaleMoERunner", (8, 2048, local, 0), shapes, derived)


def r1_fp8(rows):
    """`fp8_block_scale_moe_runner` on DeepSeek-R1 with the kernel's routing, 32 experts on a rank."""
    shapes = (
        (rows, 256), (256,), (rows, 7168), (56, rows),
        (32, 4096, 7168), (32, 32, 56), (32, 7168, 2048), (32, 56, 16), (0,), (0,),
    )  # fmt: skip
    derived = ((3, 1), (0, 0), (8, 0), (9, 0))
    return Call("trtllm::fp8_block_scale_moe_runner", "FP8BlockScaleMoERunner", (8, 2048, 32, 0), shapes, derived)


def r1_fp8_fp4(rows):
    """`fp8_fp4_block_scale_moe_runner` on DeepSeek-R1 with ids, 32 experts on a rank."""
    shapes = (
        (0,), (0,), (rows, 7168),
        (32, 4096, 3584), (32, 4096, 224), (32, 7168, 1024), (32, 7168, 64), (32,), (32,), (32,), (rows, 8), (rows, 8),
    )  # fmt: skip
    derived = ((0, 0), (10, 0), (11, 0))
    return Call(
        "trtllm::fp8_fp4_block_scale_moe_runner", "FP8FP4BlockScaleMoERunner", (8, 2048, 32, 0), shapes, derived
    )


def gpt_oss(kind, rows):
    """A mxfp4 runner on gpt-oss-120b with ids, 16 experts on a rank: H 2880 padded to 3072 and 2944, I to 2944."""
    first = ((16, 5888, 1536), (16, 5888, 96), (16, 5888), (16,), (16,), (16,))
    second = ((16, 2944, 1472), (16, 2944, 92), (16, 2944))
    routing, ids = ((0,), (0,)), ((rows, 4), (rows, 4))
    unique = (4, 2944, 2880, 2880, 16, 0)
    match kind:
        case "mxfp8":
            shapes = (*routing, (rows, 3072), (rows * 96,), *first, *second, *ids)
            derived = ((3, 0), (0, 0), (13, 0), (14, 0))
            name = "MxE4m3MxE2m1BlockScaleMoERunner", "mxe4m3_mxe2m1"
        case "fp8":
            shapes = (*routing, (rows, 3072), *first, *second, (16,), (16,), (16,), *ids)
            derived = ((0, 0), (15, 0), (16, 0))
            name = "E4m3MxE2m1BlockScaleMoERunner", "e4m3_mxe2m1"
        case _:
            shapes = (*routing, (rows, 3072), *first, *second, *ids)
            derived = ((0, 0), (12, 0), (13, 0))
            name, unique = ("Bf16MxE2m1BlockScaleMoERunner", "bf16_mxe2m1"), hash(unique)
    return Call(f"trtllm::{name[1]}_block_scale_moe_runner", name[0], unique, shapes, derived)


def listed(tactic):
    return [tactic["tile_n"], tactic["config"]]


@pytest.mark.parametrize("rank", [0, 7])
def test_attention_dp_hits_by_the_rows_of_the_pool(rank):
    given = made(R1, DEP8)
    reader = Reader(text_of(given), rank)
    for rows in (1, 8, 15, 16, 100, 8 * 300, 8 * 8192, 8 * 20000):
        found = reader.choose(r1_nvfp4(rows, ids=True), ep_size=8, use_dp=True)
        assert found == listed(given.tactic(rows)), rows


@pytest.mark.parametrize("ids", [False, True])
def test_pure_ep_hits_whether_or_not_the_kernel_routes(ids):
    given = made(R1, PURE_EP8)
    reader = Reader(text_of(given), 3)
    for rows in (1, 3, 64, 127, 128, 8191, 8192, 12000):
        assert reader.choose(r1_nvfp4(rows, ids), ep_size=8) == listed(given.tactic(rows)), rows


def test_a_pool_that_was_measured_as_it_is_hits_by_the_same_rows():
    given = made(R1, Regime(ep_size=8, attention_dp=True, layout="pool", tune_max_num_tokens=65536))
    reader = Reader(text_of(given), 0)
    for rows in (8, 64, 4096):
        assert reader.choose(r1_nvfp4(rows, ids=True), ep_size=8, use_dp=True) == listed(given.tactic(rows))


def test_rows_past_8192_have_the_maximum_as_a_bucket():
    given = made(R1, Regime(ep_size=8, tune_max_num_tokens=20000))
    reader = Reader(text_of(given), 0)
    answer = reader.choose(r1_nvfp4(15000, ids=True), ep_size=8, tune_max_num_tokens=20000)
    assert answer == listed(given.choices[-1].tactic)


def test_another_shard_misses():
    reader = Reader(text_of(made(R1, PURE_EP8)), 0)
    assert reader.choose(r1_nvfp4(64, ids=True, local=16), ep_size=16) == -1


@pytest.mark.parametrize(
    ("layer", "strict", "call"),
    [
        (R1, {}, lambda rows: r1_nvfp4(rows, ids=True)),
        (preset("deepseek-r1"), {"fp8_block_layout": "plain"}, r1_fp8),
        (GPT_OSS, {"mxfp4_activations": "mxfp8"}, lambda rows: gpt_oss("mxfp8", rows)),
        (GPT_OSS, {"activations": "fp8"}, lambda rows: gpt_oss("fp8", rows)),
        (GPT_OSS, {}, lambda rows: gpt_oss("bf16", rows)),
        (R1, {"activations": "fp8"}, r1_fp8_fp4),
    ],
    ids=[runner.name for runner in RUNNERS],
)
def test_each_of_the_six_runners_hits(layer, strict, call):
    given = made(layer, PURE_EP8, strict)
    reader = Reader(text_of(given), 5)
    for rows in (1, 48, 4096):
        assert reader.choose(call(rows), ep_size=8) == listed(given.tactic(rows)), rows


@pytest.mark.parametrize(
    ("version", "old", "new"),
    [
        (None, True, True),
        ("1.2.0", True, False),
        ("1.3.0rc21", True, False),
        ("1.3.0rc25", True, True),
        ("1.3.0rc27", False, True),
        ("1.3.0", False, True),
    ],
)
@pytest.mark.parametrize(
    ("layer", "strict", "call", "unique_id"),
    [
        (preset("deepseek-r1"), {"fp8_block_layout": "plain"}, r1_fp8, (8, 0, 2048, 32, 0)),
        (
            GPT_OSS,
            {"mxfp4_activations": "mxfp8"},
            lambda rows: gpt_oss("mxfp8", rows),
            (4, 2944, 2880, 2880, 16, 0, False, 8),
        ),
    ],
)
def test_keys_are_spelled_as_the_version_spells_them(version, old, new, layer, strict, call, unique_id):
    given = made(layer, PURE_EP8, strict)
    result = export(given, version)
    ((_, text),) = result.files.items()
    hits = [
        Reader(text, 0).choose(one, ep_size=8) == listed(given.tactic(64))
        for one in (call(64), replace(call(64), unique_id=unique_id))
    ]
    assert hits == [old, new]
    assert any("spelled in 2 ways" in note for note in result.notes) == (old and new)


def test_packed_rows_of_an_undivided_ladder_stand_for_the_rows_that_they_were_measured_at():
    given = made(R1, Regime(ep_size=8, attention_dp=True))
    reader = Reader(text_of(given), 0)
    for rows in (8, 64, 4096):
        found = reader.choose(r1_nvfp4(rows, ids=True), ep_size=8, use_dp=True)
        assert found == listed(given.tactic(rows // 8)), rows
    assert {bucket: choice.rows for bucket, choice in lookups(given).items()} == {
        rows: rows for rows in Regime(ep_size=8, attention_dp=True).buckets
    }


def test_rows_of_one_slot_are_refused():
    with pytest.raises(UnsupportedError, match="rows of one slot"):
        export(made(R1, Regime(ep_size=8, attention_dp=True, layout="slot")))


def test_the_file_is_the_golden_one():
    given = made(SMALL, Regime(ep_size=2, attention_dp=True, ladder="pow2/2"))
    text = text_of(given)
    assert text == GOLDEN.read_text()
    reader = Reader(text, 1)
    assert (reader.version, reader.device, reader.capability) == ("1.3.0", "NVIDIA B200", (10, 0))
    assert reader.created == 1767225600.0
    assert len(reader.cache) == 14 * 2
    assert {entry[0] for entry in reader.cache.values()} == {0}
    assert min(entry[2] for entry in reader.cache.values()) == pytest.approx(0.011)  # milliseconds


def test_every_rank_of_the_world_has_its_entries():
    document = json.loads(text_of(made(SMALL, Regime(ep_size=2, tp_size=2))))
    assert sorted(document) == ["metadata", "rank_0", "rank_1", "rank_2", "rank_3", "shared"]
    assert document["rank_0"] == document["rank_3"]


def test_a_router_without_a_bias_has_none_in_its_key():
    plain = MoELayer(**{**dict(R1), "routing": RoutingMethod()})
    keys = json.loads(text_of(made(plain, PURE_EP8)))["rank_0"]
    assert sum("((-1, 256), (0,), " in key for key in keys) == 14


def test_the_warning_says_that_the_engines_number_their_kernels_apart():
    result = exported(made(SMALL, PURE_EP8), "trtllm")
    assert "FlashInfer's trtllm-gen build" in result.warnings[0]
    (path,) = (path for path in result.files if path.endswith(".json") and "moetune" not in path)
    assert result.variables == {"TLLM_AUTOTUNER_CACHE_PATH": f"{FOLDER}/{path.partition('/')[2]}"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"precision": "bf16"}, "bf16 experts.*fp8_block × fp8_block"),
        ({"precision": "mxint4"}, "no tuned trtllm-gen runner for mxint4"),
        ({"intermediate_size": 64}, "multiples of 128"),
        ({"activation": "gelu"}, "gelu"),
        ({"precision": "fp8_block", "expert_bias": True}, "neither expert bias"),
    ],
)
def test_a_layer_without_a_runner_is_refused(changed, said):
    layer = MoELayer(**{**dict(SMALL), **changed})
    with pytest.raises(UnsupportedError, match=said):
        export(made(layer, PURE_EP8, {"fp8_block_layout": "plain"}))


@pytest.mark.parametrize("strict", [{}, {"fp8_block_layout": "blocked"}])
def test_fp8_blocks_that_lie_otherwise_than_in_the_checkpoint_are_refused(strict):
    with pytest.raises(UnsupportedError, match="layout of the checkpoint") as refused:
        export(made(preset("deepseek-r1"), PURE_EP8, strict))
    assert "fp8_block_layout=plain" in refused.value.hint


def test_other_backends_are_refused():
    with pytest.raises(UnsupportedError, match="the profile's are of flashinfer-cutlass"):
        export(made(SMALL, PURE_EP8, backend="flashinfer-cutlass"))


@pytest.mark.parametrize("version", ["1.1.0", "next", "1"])
def test_a_version_of_another_format_is_refused(version):
    with pytest.raises(UsageError, match=version):
        export(made(SMALL, PURE_EP8), version)


def test_the_version_is_written():
    ((_, text),) = export(made(SMALL, PURE_EP8), "1.2.1").files.items()
    assert Reader(text, 0).version == "1.2.1"
