"""The names of the engines' files. tests/export reads exported files back by them."""

import pytest

from moetune.backends.grouped_triton.engine_files import ConfigFile, release, sglang_folder, vllm_device_name
from moetune.inputs import presets
from moetune.spec.regime import Regime


@pytest.mark.parametrize(
    ("model", "regime", "device", "name"),
    [  # names of files that SGLang 0.5.23 ships for the second GEMM
        ("qwen3-30b-a3b", Regime(), "NVIDIA H100 80GB HBM3", "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3_down.json"),
        (
            "deepseek-r1",
            Regime(tp_size=8),
            "NVIDIA H20",
            "E=256,N=256,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128, 128]_down.json",
        ),
    ],
)
def test_sglang_has_files_of_their_own_for_the_second_gemm(model, regime, device, name):
    layer = presets.layer(model)
    named = ConfigFile.of(layer, regime, device, regime.shard(layer).num_local)
    assert named.sglang_name(down=True) == name
    assert named.sglang_name() == name.replace("_down", "")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H200 NVL", "NVIDIA_H200"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3"),
        ("NVIDIA GH200 480GB", "NVIDIA_GH200_480GB"),
        ("AMD Radeon R9 200 / HD", "AMD_Radeon_R9_200_HD"),
    ],
)
def test_vllms_device_names(device, name):
    assert vllm_device_name(device) == name


@pytest.mark.parametrize(
    ("version", "numbers"), [("3.6.0", "3.6.0"), ("3.6.0+git12ab", "3.6.0"), ("3.6.0.post1", "3.6.0"), ("nightly", "")]
)
def test_release_is_the_leading_numbers(version, numbers):
    assert release(version) == numbers


def test_a_folder_of_sglang_has_the_whole_version_of_triton():
    assert sglang_folder("3.6.0") == "triton_3_6_0"
    assert sglang_folder("3.6.0+git1") == "triton_3_6_0+git1"
