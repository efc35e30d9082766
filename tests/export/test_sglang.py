import json
from pathlib import Path

import pytest
from triton_profiles import STRICT, profile, sglang_reads, tactic

from moetune.errors import UnsupportedError
from moetune.export.sglang import export

GOLDEN = Path(__file__).parent / "golden" / "sglang"
FP8 = ("fp8_w8a8", "128, 128")
ZERO = {**STRICT, "remote": "zero"}


def test_the_file_is_the_golden_one():
    tactics = {1: tactic(16, 32, 128, 1, 4, 4), 4: tactic(16, 128, 128, 32, 4, 3), 8: tactic(64, 128, 128, 16, 8, 3)}
    files = export(profile(tactics=tactics, strict=ZERO)).files
    assert files == {str(path.relative_to(GOLDEN)): path.read_text() for path in GOLDEN.rglob("*.json")}


@pytest.mark.parametrize(
    ("layer", "regime", "names"),
    [  # names of files that SGLang bundles; the shared expert among the routed ones where no rank shares experts
        ("qwen3-30b-a3b", {"ep_size": 1}, ["E=128,N=768,device_name=NVIDIA_H200.json"]),
        (
            "deepseek-r1",
            {"tp_size": 8},
            [
                "E=256,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json",
                "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json",
            ],
        ),
    ],
)
def test_names_are_those_of_bundled_files(layer, regime, names):
    paths = [Path(path) for path in export(profile(layer, **regime)).files]
    assert [path.name for path in paths] == names
    assert {str(path.parent) for path in paths} == {"configs/triton_3_6_0"}


def test_the_device_has_its_full_name():
    exported = export(profile(device="NVIDIA H200 NVL"))
    assert sglang_reads(exported.files, "3.6.0", "NVIDIA H200 NVL", 32, 2048, *FP8)
    assert sglang_reads(exported.files, "3.6.0", "NVIDIA H200", 32, 2048, *FP8) is None


@pytest.mark.parametrize(
    ("measured", "running"), [("3.6.0", "3.6.0"), ("3.6.0", "3.7.1"), ("3.6.0+git1", "3.6.0+git1")]
)
def test_sglang_finds_the_file_also_from_another_triton(measured, running):
    exported = export(profile(strict={**STRICT, "triton": measured}))
    assert sglang_reads(exported.files, running, "NVIDIA H200", 32, 2048, *FP8)
    assert any("Triton 3.6.0+git1 is filed under 3.6.0" in note for note in exported.notes) is ("+" in measured)


def test_no_key_but_rows_and_no_block_past_the_scale_block():
    (text,) = export(profile(tactics={1: tactic(16, 128, 256, 1, 4, 3)})).files.values()
    assert json.loads(text) == {"1": {**tactic(16, 128, 128, 1, 4, 3)}}


def test_the_fused_shared_expert_has_a_file_of_its_own_and_a_warning_where_no_rank_shares_experts():
    alone = export(profile(tp_size=8))
    routed, fused = (sglang_reads(alone.files, "3.6.0", "NVIDIA H200", experts, 256, *FP8) for experts in (256, 257))
    assert routed == fused is not None
    assert any("E = 257, and a row has 9 slots" in warning for warning in alone.warnings)

    shared = export(profile(strict=ZERO))
    assert [path for path in shared.files if "E=33" in path] == []
    assert shared.warnings == ()


@pytest.mark.parametrize(
    ("regime", "warned"),
    [
        ({"ep_size": 8}, None),
        ({"ep_size": 8, "dispatch": "allgather"}, None),
        ({"ep_size": 8, "layout": "deduplicated"}, "No dispatcher of SGLang produces the deduplicated load"),
        ({"ep_size": 8, "layout": "packed"}, "No dispatcher of SGLang produces the packed load"),
        ({"ep_size": 8, "layout": "pool"}, "With sglang:flashinfer SGLang runs FlashInfer's kernels"),
    ],
)
def test_a_load_that_sglang_does_not_give_to_triton_is_warned_of(regime, warned):
    warnings = " ".join(export(profile("qwen3-30b-a3b", strict=ZERO, **regime)).warnings)
    assert (warned in warnings) if warned else warnings == ""


def test_dropped_remote_slots_are_warned_of():
    (warning,) = export(profile("qwen3-30b-a3b", ep_size=8)).warnings
    assert "SGLang runs blocks of zeros for non-local slots" in warning
    assert "--remote zero" in warning
    assert export(profile("qwen3-30b-a3b", ep_size=1)).warnings == ()


def test_blackwell_prefers_another_kernel():
    stored = profile("qwen3-30b-a3b", strict={**ZERO, "compute_capability": "10.0"})
    assert any("--moe-runner-backend triton" in warning for warning in export(stored).warnings)


def test_that_only_the_default_a2a_backend_reaches_triton_is_noted():
    assert any("--moe-a2a-backend none" in note for note in export(profile()).notes)


@pytest.mark.parametrize(("triton", "noted"), [("3.6.0", True), ("3.4.0", False)])
def test_a_triton_that_old_versions_do_not_fall_back_to_is_noted(triton, noted):
    notes = export(profile(strict={**STRICT, "triton": triton})).notes
    assert any("SGLang 0.5.10 finds the file only while" in note for note in notes) is noted


def test_another_backend_is_refused():
    with pytest.raises(UnsupportedError, match="SGLang reads tactics of the backend triton"):
        export(profile(backend="flashinfer-cutlass"))
