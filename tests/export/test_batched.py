"""The file for vLLM's batched Triton kernel."""

import json

import pytest
from triton_profiles import STRICT, profile, tactic, vllm_reads

from moetune.errors import UnsupportedError, UsageError
from moetune.export import export
from moetune.export.fitting import export_words
from moetune.export.lookup import lookup
from moetune.export.places import Places
from moetune.inputs.launch_table import read
from moetune.spec.tactic import Tactic

TACTIC = Tactic(BLOCK_SIZE_M=32, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128)
NAME = "E=16,N=1536,device_name=NVIDIA_H200.json"
LINE = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel"
LOW_LATENCY = f"{LINE} --all2all-backend deepep_low_latency"


def batched(layer="qwen3-235b-a22b", chosen=TACTIC, **given):
    regime = {"ep_size": 8, "layout": "batched", "ladder": "2048", "tune_max_num_tokens": 8192}
    strict = {name: value for name, value in STRICT.items() if name != "remote"}
    return profile(layer, {2048: chosen}, backend="batched-triton", **{"strict": strict, **regime, **given})


def test_the_file_has_the_name_of_the_grouped_kernels_and_one_row_the_capacity():
    exported = export(batched(), "vllm")
    folder = "ep8-tp1-dp-alltoall-batched-random"
    files = {path.removeprefix(f"{folder}/"): text for path, text in exported.files.items()}
    assert NAME in files
    assert json.loads(files[NAME])["triton_version"] == STRICT["triton"]
    whole = {**TACTIC, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
    assert vllm_reads(files, "NVIDIA H200", 16, 1536) == {2048: whole}
    grouped = export(profile("qwen3-235b-a22b", ep_size=8, dispatch="allgather"), "vllm")
    assert {path.rpartition("/")[2] for path in grouped.files} & {NAME}
    assert not set(exported.files) & set(grouped.files), "a folder of its own"


def test_the_export_says_why_the_folder_is_its_own():
    exported = export(batched(), "vllm")
    assert "`--moe-backend triton`" in exported.usage
    assert "keep this folder apart from the files of the grouped kernel" in exported.usage
    assert any("its own, so that neither kernel reads what was tuned for the other" in note for note in exported.notes)
    assert any("2,048 rows: 256 tokens of each of 8 ranks" in note for note in exported.notes)
    assert exported.warnings == ()
    assert export_words(batched()) == ["--to", "vllm"]


def test_fp8_blocks_are_warned_of_deepgemm():
    exported = export(batched("deepseek-r1", ep_size=16, ladder="2048"), "vllm")
    (warning,) = exported.warnings
    assert "prefers DeepGEMM's masked kernels to Triton" in warning
    assert any(
        path.endswith("N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json")
        for path in exported.files
    )


@pytest.mark.parametrize(("version", "warned"), [("0.26.0", 0), ("0.33.0", 0), ("0.20.2", 1), ("0.40", 1)])
def test_a_version_that_was_not_read_is_a_warning(version, warned):
    found = export(batched(), "vllm", version=version).warnings
    assert len([each for each in found if "was not read" in each]) == warned


def test_what_no_engine_could_run_is_refused():
    with pytest.raises(UsageError, match="Not a version"):
        export(batched(), "vllm", version="newest")
    with pytest.raises(UnsupportedError, match="does not say compute_capability, triton"):
        export(batched(strict={}), "vllm")
    with pytest.raises(UnsupportedError, match="has the tunables BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K"):
        export(batched(chosen=tactic(16, 32, 64, 1, 4, 3)), "vllm")
    with pytest.raises(UnsupportedError, match="are of batched-triton"):
        export(batched(), "sglang")


def test_uneven_ranks_get_a_file_each():
    names = [path.rpartition("/")[2] for path in export(batched(ep_size=6, uneven_shards=True), "vllm").files]
    assert {name for name in names if name.startswith("E=") and "moetune" not in name} == {
        NAME.replace("E=16", "E=22"),
        NAME.replace("E=16", "E=21"),
    }


@pytest.mark.parametrize(
    ("line", "of_batched", "hit"),
    [(LOW_LATENCY, True, True), (LOW_LATENCY, False, False), (LINE, True, False), (LINE, False, True)],
)
def test_look_up_tells_the_two_kernels_files_apart(line, of_batched, hit, tmp_path):
    grouped = profile("qwen3-235b-a22b", ep_size=8, dispatch="allgather", tune_max_num_tokens=4096)
    for path, text in export(batched() if of_batched else grouped, "vllm").files.items():
        (tmp_path / path.rpartition("/")[2]).write_text(text)
    asked = read(line)
    assert asked.regime is not None
    rows = asked.regime.buckets if asked.regime.layout == "batched" else (1, 64, 2048)
    found = lookup(asked, "NVIDIA H200", Places(tmp_path, None, "3.6.0", "--folder"), rows)
    assert found.hit == hit
    if not hit:
        assert all("tuned for another deployment" in row.reason for row in found.tables[0].rows)
        assert "batched" in found.tables[0].rows[0].reason
