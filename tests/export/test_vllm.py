import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_profiles import NAMES, STRICT, looked_up, profile, tactic, vllm_reads

from moetune.backends.grouped_triton.space import VALUES
from moetune.errors import UnsupportedError, UsageError
from moetune.export.vllm import export
from moetune.spec.layer import MoELayer
from moetune.spec.tactic import Tactic

GOLDEN = Path(__file__).parent / "golden" / "vllm"
TACTICS = st.builds(
    lambda *values: Tactic(dict(zip(NAMES, values, strict=True))), *map(st.sampled_from, VALUES.values())
)


def test_the_file_is_the_golden_one():
    tactics = {1: tactic(16, 32, 128, 1, 4, 4), 4: tactic(16, 128, 128, 32, 4, 3), 8: tactic(64, 128, 128, 16, 8, 3)}
    files = export(profile(tactics=tactics)).files
    assert files == {path.name: path.read_text() for path in GOLDEN.iterdir()}


@pytest.mark.parametrize(
    ("layer", "regime", "name"),
    [  # names of files that vLLM bundles
        ("qwen3-30b-a3b", {"ep_size": 1}, "E=128,N=768,device_name=NVIDIA_H200.json"),
        ("mixtral-8x7b", {"tp_size": 4}, "E=8,N=3584,device_name=NVIDIA_H200.json"),
        (
            "deepseek-r1",
            {"tp_size": 8},
            "E=256,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
    ],
)
def test_names_are_those_of_bundled_files(layer, regime, name):
    assert list(export(profile(layer, **regime)).files) == [name]


@settings(max_examples=25)
@given(st.lists(TACTICS, min_size=18, max_size=18), st.integers(1, 20_000))
def test_vllm_runs_the_tactic_that_moetune_looks_up(tactics, rows):
    buckets = profile("qwen3-30b-a3b", ep_size=8, dispatch="allgather", tune_max_num_tokens=4096).regime.buckets
    stored = profile(
        "qwen3-30b-a3b",
        dict(zip(buckets, tactics, strict=True)),
        ep_size=8,
        dispatch="allgather",
        tune_max_num_tokens=4096,
    )
    read = vllm_reads(export(stored).files, "NVIDIA H200", 16, 768)
    assert looked_up(read, rows) == dict(stored.tactic(rows))


def test_block_size_k_is_the_one_that_ran_with_block_scales():
    stored = {1: tactic(16, 128, 256, 1, 4, 3)}
    (fp8,) = export(profile(tactics=stored)).files.values()
    (bf16,) = export(profile("qwen3-30b-a3b", stored)).files.values()
    assert json.loads(fp8)["1"]["BLOCK_SIZE_K"] == 128
    assert json.loads(bf16)["1"]["BLOCK_SIZE_K"] == 256


def test_every_rank_of_uneven_shards_finds_its_file():
    exported = export(profile("qwen3-30b-a3b", ep_size=3, dispatch="allgather", uneven_shards=True))
    read = [vllm_reads(exported.files, "NVIDIA H200", experts, 768) for experts in (43, 42)]
    assert read[0] == read[1] is not None
    assert "43 experts is written for 42" in " ".join(exported.notes)


@pytest.mark.parametrize(
    ("regime", "warned"),
    [
        ({"ep_size": 8}, None),
        ({"ep_size": 8, "dispatch": "allgather"}, None),
        ({"ep_size": 8, "layout": "deduplicated"}, None),
        ({"ep_size": 8, "layout": "packed"}, "No dispatcher of vLLM produces the packed load"),
        ({"ep_size": 8, "layout": "slot"}, "No dispatcher of vLLM produces the slot load"),
        ({"ep_size": 8, "layout": "pool"}, "runs FlashInfer's kernels, which do not read this file"),
        ({"ep_size": 8, "layout": "packed", "ladder": "pow2/8"}, "divides run-time rows by 8"),
    ],
)
def test_a_load_that_vllm_does_not_give_to_triton_is_warned_of(regime, warned):
    warnings = " ".join(export(profile("qwen3-30b-a3b", **regime)).warnings)
    assert (warned in warnings) if warned else warnings == ""


def test_the_words_of_a_warning_can_be_given_to_tune():
    warnings = " ".join(export(profile("qwen3-30b-a3b", ep_size=8, layout="packed")).warnings)
    assert "with --dispatch vllm:allgather_reducescatter or vllm:deepep_high_throughput." in warnings


@pytest.mark.parametrize(
    ("layer", "capability", "ep_size", "preferred"),
    [
        ("deepseek-r1", "9.0", 8, "FlashInfer's CUTLASS kernel and DeepGEMM"),
        ("deepseek-r1", "9.0", 1, None),
        ("qwen3-30b-a3b", "9.0", 8, None),
        ("qwen3-30b-a3b", "10.0", 8, "FlashInfer's kernels"),
        ("deepseek-r1", "8.9", 8, None),
    ],
)
def test_a_kernel_that_vllm_prefers_to_triton_is_warned_of(layer, capability, ep_size, preferred):
    stored = profile(layer, ep_size=ep_size, strict={**STRICT, "compute_capability": capability})
    warnings = " ".join(export(stored).warnings)
    if preferred is None:
        assert warnings == ""
    else:
        assert f"vLLM prefers {preferred} to Triton" in warnings
        assert "--moe-backend triton" in warnings


@pytest.mark.parametrize(
    ("remote", "version", "warned"),
    [("drop", None, False), ("zero", None, True), ("zero", "0.19.1", False), ("drop", "0.19.1", True)],
)
def test_a_profile_that_treats_remote_slots_otherwise_than_this_vllm_is_warned_of(remote, version, warned):
    stored = profile("qwen3-30b-a3b", ep_size=8, dispatch="allgather", strict={**STRICT, "remote": remote})
    assert bool(export(stored, version).warnings) is warned
    alone = profile("qwen3-30b-a3b", ep_size=1, strict={**STRICT, "remote": remote})
    assert export(alone, version).warnings == ()


def test_a_ladder_that_rounds_otherwise_and_a_missing_bucket_are_noted():
    nearest = export(profile(ladder="vllm", tune_max_num_tokens=8)).notes
    assert nearest == ("The file has 4 configurations for 4 row counts.",)
    notes = " ".join(export(profile(tactics={1: tactic(16, 32, 64, 1, 4, 3)}, ladder="1,2,8")).notes)
    assert "takes the nearest bucket" in notes
    assert "rounds up" in notes
    assert "Not measured, so not in the file: 2, 8 rows." in notes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backend": "torch"}, "reads tactics of the backend triton; the profile's are of torch"),
        ({"layer": "gpt-oss-20b"}, "has no file for mxfp4 experts"),
        ({"strict": {"cpu": "EPYC"}}, "does not say compute_capability, remote, triton"),
        ({"tactics": {1: Tactic(BLOCK_SIZE_M=16)}}, "has the tunables BLOCK_SIZE_M, BLOCK_SIZE_N"),
        ({"tactics": {1: tactic(16, 32, 64, 1, 4, 0)}}, "positive integers"),
    ],
)
def test_a_profile_that_the_kernel_has_no_use_for_is_refused(changed, said):
    with pytest.raises(UnsupportedError, match=said) as refused:
        export(profile(**changed))
    assert refused.value.hint


def test_an_unknown_version_is_refused():
    with pytest.raises(UsageError, match="Not a version: 'latest'"):
        export(profile(), "latest")


def test_fp32_experts_have_a_dtype_in_the_name():
    layer = MoELayer(num_experts=16, top_k=2, hidden_size=64, intermediate_size=32, precision="fp32")
    assert vllm_reads(export(profile(layer, ep_size=4)).files, "NVIDIA H200", 4, 32, "float32")
