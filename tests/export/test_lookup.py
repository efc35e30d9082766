"""Spoiled set-ups, each of which an engine ignores without an error, and the reason that is given for each."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.export.engine_log import parsed_log
from moetune.export.lookup import FAR, lookup
from moetune.export.near_misses import differing
from moetune.export.places import Places
from moetune.inputs.launch_table import read
from moetune.spec.ladder import VLLM_BUCKETS

QWEN = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel"
QWEN_NAME = "E=16,N=1536,device_name=NVIDIA_H200.json"
R1 = "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8"
FP8 = ",dtype=fp8_w8a8,block_shape=[128, 128]"
R1_NAME = f"E=257,N=256,device_name=NVIDIA_H200{FP8}.json"
ROWS = {str(rows): {"BLOCK_SIZE_M": 16} for rows in VLLM_BUCKETS}


@pytest.fixture
def own(tmp_path):
    """Returns a function that writes tuned files below a folder and returns the folder."""

    def written(*names, rows=ROWS):
        for name in names:
            path = tmp_path / "own" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
        return tmp_path / "own"

    return written


def looked_up(line, folder, *, device="NVIDIA H200", shipped=None, log=None, rows=VLLM_BUCKETS, triton="3.6.0"):
    found = lookup(read(line), device, Places(folder, shipped, triton, "--folder"), rows, log)
    (table,) = found.tables
    assert found.hit == all(row.hit for row in table.rows)
    return found, table


def missed(line, folder, **given):
    """The one reason of a look-up that misses every row count, and the first near miss."""
    _, table = looked_up(line, folder, **given)
    assert not any(row.hit for row in table.rows)
    (reason,) = table.reasons
    return reason, (table.near_misses or (None,))[0]


def test_a_table_with_the_right_name_is_hit_in_every_bucket(own):
    found, table = looked_up(QWEN, own(QWEN_NAME))
    assert found.hit
    assert [(row.rows, row.key) for row in table.rows] == [(rows, rows) for rows in VLLM_BUCKETS]
    assert (table.file, table.near_misses, table.reasons) == (table.looked_in[0], (), ())


def test_all_h200s_have_one_name_in_vllm_and_each_its_own_in_sglang(own):
    folder = own(QWEN_NAME, "configs/triton_3_6_0/E=128,N=192,device_name=NVIDIA_H200.json")
    assert looked_up(QWEN, folder, device="NVIDIA H200 NVL")[0].hit
    sglang = "python -m sglang.launch_server --model-path Qwen/Qwen3-235B-A22B --tp 8"
    assert looked_up(sglang, folder)[0].hit
    assert not looked_up(sglang, folder, device="NVIDIA H200 NVL")[0].hit


def test_another_device_is_a_near_miss(own):
    name = "E=16,N=1536,device_name=NVIDIA_H100_80GB_HBM3.json"
    reason, near = missed(QWEN, own(name))
    assert reason == f"There is no {QWEN_NAME} where vLLM looks."
    assert near.path.endswith(name)
    assert near.differs["device_name"].model_dump() == {"wanted": "NVIDIA_H200", "found": "NVIDIA_H100_80GB_HBM3"}
    assert list(near.differs) == ["device_name"]


def test_sglang_counts_the_fused_shared_expert(own):
    folder = own(f"configs/triton_3_6_0/{R1_NAME.replace('257', '256')}")
    own(f"configs/triton_3_6_0/{R1_NAME.replace('.json', '_down.json')}")
    _, near = missed(R1, folder)
    assert near.differs["E"].model_dump() == {"wanted": "257", "found": "256"}
    assert near.meaning.startswith("SGLang fuses the shared expert, so E is 257; --disable-shared-experts-fusion")
    assert looked_up(f"{R1} --disable-shared-experts-fusion", folder)[0].hit


def test_vllm_does_not_count_the_shared_expert(own):
    name = "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    _, near = missed("vllm serve deepseek-ai/DeepSeek-R1 -tp 8", own(name))
    assert near.differs["E"].model_dump() == {"wanted": "256", "found": "257"}
    assert near.meaning == "It counts the shared expert, which vLLM does not fuse here."


def test_the_whole_intermediate_size_is_not_that_of_a_rank(own):
    _, near = missed("vllm serve Qwen/Qwen3-235B-A22B -tp 4", own("E=128,N=1536,device_name=NVIDIA_H200.json"))
    assert near.differs["N"].model_dump() == {"wanted": "384", "found": "1536"}
    assert near.meaning == "It has the whole intermediate size; at TP 4 a rank has 384."


def test_all_experts_are_not_those_of_a_rank(own):
    _, near = missed(QWEN, own("E=128,N=1536,device_name=NVIDIA_H200.json"))
    assert near.meaning == "It counts all experts; at EP 8 a rank has 16."


def test_a_missing_dtype_and_a_blank_in_the_block_are_named(own):
    line = "vllm serve deepseek-ai/DeepSeek-R1 -tp 8"
    stem = "E=256,N=256,device_name=NVIDIA_H200"
    _, table = looked_up(line, own(f"{stem}.json", f"{stem}{FP8}.json"))
    block, dtype = table.near_misses
    assert block.differs["block_shape"].model_dump() == {"wanted": "[128,128]", "found": "[128, 128]"}
    assert set(dtype.differs) == {"dtype", "block_shape"}


def test_another_tritons_folder_is_read_by_sglang_and_is_a_miss(own):
    reason, near = missed(R1, own(f"configs/triton_3_5_1/{R1_NAME}"))
    assert "for Triton 3.6.0 and falls back to" in reason
    assert "triton_3_5_1" in reason
    assert near is None
    assert looked_up(R1, own(), triton="3.5.1")[0].hit


def test_sglang_looks_in_configs_below_the_folder(own):
    reason, near = missed(R1, own(f"triton_3_6_0/{R1_NAME}"))
    assert "There is no folder" in reason
    assert "stops with an error" in reason
    assert near.differs["folder"].found.endswith("triton_3_6_0")


def test_a_file_one_folder_deeper_is_not_found(own):
    _, near = missed(QWEN, own(f"ep8-tp1-dp-allgather-random/{QWEN_NAME}"))
    assert near.meaning == "The engine does not look in this folder."


def test_sglangs_file_of_the_second_gemm_is_named(own):
    down = R1_NAME.replace(".json", "_down.json")
    folder = own(f"configs/triton_3_6_0/{R1_NAME}")
    assert looked_up(R1, folder)[1].down_file is None
    found, table = looked_up(R1, own(f"configs/triton_3_6_0/{down}"))
    assert found.hit
    assert table.down_file.endswith(down)


@pytest.mark.parametrize(
    ("line", "name", "runs"),
    [
        (
            "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep",
            "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
            "runs FlashInfer's CUTLASS kernels: it reads no tuned file then",
        ),
        (f"{QWEN} --moe-backend flashinfer_cutlass", QWEN_NAME, "runs flashinfer_cutlass: it reads no tuned file then"),
        (f"VLLM_BATCH_INVARIANT=1 {QWEN}", QWEN_NAME, "VLLM_BATCH_INVARIANT makes vLLM run its default"),
        (
            f"{R1} --moe-a2a-backend deepep",
            f"configs/triton_3_6_0/E=32,N=2048,device_name=NVIDIA_H200{FP8}.json",
            "runs DeepGEMM: it reads no tuned file then",
        ),
    ],
)
def test_kernels_that_read_no_file_miss_a_file_with_the_right_name(own, line, name, runs):
    folder = own(name)
    reason, _ = missed(line, folder)
    assert runs in reason
    assert looked_up(line, folder)[1].file is None


def test_without_scales_that_are_powers_of_two_deep_gemm_reads_the_file_for_few_rows(own):
    name = "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    line = "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --moe-backend deep_gemm"
    assert not any(row.hit for row in looked_up(line, own(name))[1].rows)
    _, table = looked_up(f"VLLM_USE_DEEP_GEMM_E8M0=0 {line}", own(name))
    assert [row.rows for row in table.rows if row.hit] == [rows for rows in VLLM_BUCKETS if rows < 128]
    assert table.reasons[0].startswith("Above 127 rows the engine runs DeepGEMM")


def test_a_partial_ladder_misses_where_no_key_is_near(own):
    few = {"triton_version": "3.6.0", "64": {}, "128": {}}
    _, table = looked_up(QWEN, own(QWEN_NAME, rows=few))
    assert [row.rows for row in table.rows if row.hit] == [32, 48, 64, 96, 128, 256]
    assert [row.key for row in table.rows] == [64] * 10 + [128] * 8
    assert table.reasons == (
        "The file has no row count near: its keys are 64, 128. Tune the missing buckets and export again.",
    )


def test_a_file_without_rows_is_ignored(own):
    reason, _ = missed(QWEN, own(QWEN_NAME, rows={"triton_version": "3.6.0"}))
    assert "has no row, so vLLM runs its default" in reason


def test_the_engines_own_file_is_a_miss_if_a_folder_was_meant(own, tmp_path):
    shipped = tmp_path / "site"
    shipped.mkdir()
    (shipped / QWEN_NAME).write_text(json.dumps(ROWS))
    folder = own("E=16,N=1536,device_name=NVIDIA_B200.json")
    reason, near = missed(QWEN, folder, shipped=shipped)
    assert reason == f"--folder {folder} has no {QWEN_NAME}; vLLM reads its own {shipped / QWEN_NAME}."
    assert near.differs["device_name"].found == "NVIDIA_B200"
    assert looked_up(QWEN, None, shipped=shipped)[0].hit


def test_a_folder_of_another_deployment_is_found_out_by_its_provenance(own):
    """The name contains neither k, H, ep nor the dispatch."""
    origin = read(QWEN)
    folder = own(QWEN_NAME)
    path = folder / f"{QWEN_NAME.removesuffix('.json')}.vllm.moetune.json"

    def write(layer, regime):
        path.write_text(json.dumps({"layer": layer, "regime": {**regime, "digest": "0"}}))

    layer, regime = origin.layer.model_dump(mode="json"), origin.regime.model_dump(mode="json")
    write(layer, {**regime, "distribution": "balanced", "draws": 1})
    assert looked_up(QWEN, folder)[0].hit
    write(layer, {**regime, "dispatch": "alltoall", "layout": "deduplicated"})
    reason, _ = missed(QWEN, folder)
    assert "dispatch alltoall (the line's is allgather), layout deduplicated (the line's is None)" in reason
    write({**layer, "top_k": 4}, regime)
    assert "top_k 4 (the line's is 8)" in missed(QWEN, folder)[0]
    path.write_text("{")
    assert looked_up(QWEN, folder)[0].hit


def test_a_folder_of_another_regime_is_a_near_miss(own):
    """A folder for -tp 8, with a line of -dp 8."""
    _, near = missed(QWEN, own("E=128,N=192,device_name=NVIDIA_H200.json"))
    assert set(near.differs) == {"E", "N"}


def test_uneven_shards_look_for_two_names(own):
    line = read("vllm serve Qwen/Qwen3-235B-A22B -dp 6 --enable-expert-parallel")
    names = ["E=22,N=1536,device_name=NVIDIA_H200.json", "E=21,N=1536,device_name=NVIDIA_H200.json"]
    places = Places(own(names[0]), None, "", "--folder")
    found = lookup(line, "NVIDIA H200", places, (8,))
    assert [table.name for table in found.tables] == names
    assert ([table.rows[0].hit for table in found.tables], found.hit) == ([True, False], False)
    own(names[1])
    assert lookup(line, "NVIDIA H200", places, (8,)).hit


def test_without_an_engine_and_a_folder_nothing_is_found():
    reason, _ = missed(QWEN, None)
    assert reason == (
        f"vLLM is not installed here and no folder is given, so there is no {QWEN_NAME} to find. "
        "Give --folder DIR, as `moetune export` printed it."
    )


def test_a_file_that_is_no_json_is_an_error(own):
    (own(QWEN_NAME) / QWEN_NAME).write_text("{")
    with pytest.raises(UsageError, match="or give another folder with --folder"):
        looked_up(QWEN, own())


def test_a_log_proves_a_hit_whatever_kernels_are_expected(own):
    name = "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    line = "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep"
    log = parsed_log(f"Using configuration from /elsewhere/{name} for MoE layer.")
    found, table = looked_up(line, own(name), log=log)
    assert (found.hit, table.logged) == (True, "read")
    assert not looked_up(line, own())[0].hit


def test_a_log_proves_a_read_of_a_file_that_is_not_here(own):
    log = parsed_log(f"Using configuration from /elsewhere/{QWEN_NAME} for MoE layer.")
    found, table = looked_up(QWEN, own("other.json"), log=log)
    assert (found.hit, table.rows[0].key) == (True, None)
    assert any("its row counts are not checked" in warning for warning in found.warnings)


def test_the_plugin_answers_without_a_file(own):
    log = parsed_log("moetune: Triton experts E=16, N=1536: profile of qwen3-235b-a22b under ep8, 18 buckets")
    found, table = looked_up(QWEN, None, log=log)
    assert (found.hit, table.logged, table.file, table.looked_in) == (True, "plugin", None, ())
    found, _ = looked_up(f"MOETUNE_REGIME='--model x' {QWEN}", own(QWEN_NAME))
    assert any("moetune's plugin has a profile, it answers" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"Using default MoE config. Performance might be sub-optimal! Config file not found at /x/{QWEN_NAME}",
            "runs its default configuration",
        ),
        ("", "The log does not name"),
        (
            "Using configuration from /x/E=128,N=192,device_name=NVIDIA_H200.json for MoE layer.",
            "It names E=128,N=192,device_name=NVIDIA_H200.json.",
        ),
        (
            f"Using configuration from /s/vllm/model_executor/layers/fused_moe/configs/{QWEN_NAME} for MoE layer.",
            "reads its own /s/vllm",
        ),
    ],
)
def test_a_log_proves_a_miss_of_a_file_with_the_right_name(own, text, reason):
    assert reason in missed(QWEN, own(QWEN_NAME), log=parsed_log(text))[0]


def test_near_misses_are_the_nearest_and_few(own):
    names = [f"E={experts},N=1536,device_name=NVIDIA_H200.json" for experts in range(20, 30)]
    far = "E=8,N=512,device_name=NVIDIA_B200,dtype=fp8_w8a8.json"
    folder = own(far, *names, "E=16,N=1536,device_name=NVIDIA_H200.vllm.moetune.json")
    _, table = looked_up(QWEN, folder)
    assert [list(near.differs) for near in table.near_misses] == [["E"]] * 5


def test_differing_parts_of_names_that_are_none():
    assert differing(QWEN_NAME, "README.md") is None
    assert differing(QWEN_NAME, QWEN_NAME) == {}


@given(st.sets(st.integers(1, 8192), min_size=1, max_size=12), st.integers(1, 8192))
def test_the_key_is_the_engines_and_a_hit_is_near(tmp_path_factory, keys, rows):
    folder = tmp_path_factory.mktemp("keys")
    (folder / QWEN_NAME).write_text(json.dumps({str(key): {} for key in keys}))
    _, table = looked_up(QWEN, folder, rows=(rows,))
    (row,) = table.rows
    assert abs(row.key - rows) == min(abs(key - rows) for key in keys)
    assert row.hit == (1 / FAR <= row.key / rows <= FAR)
