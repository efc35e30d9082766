"""What an engine's log proves about tuned files."""

import pytest

from moetune.errors import UsageError
from moetune.export.engine_log import parsed_log, read_log

NAME = "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
SGLANG_NAME = "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
SGLANG_DOWN = SGLANG_NAME.replace(".json", "_down.json")
OTHER = "E=16,N=1536,device_name=NVIDIA_H200.json"
VLLM_PREFIX = "(Worker_DP3_EP3 pid=71) INFO 11-20 08:15:01 [fused_moe.py:1152] "
READ = f"{VLLM_PREFIX}Using configuration from /tuned folder/{NAME} for MoE layer."
DEFAULT = (
    f"{VLLM_PREFIX}Using default MoE config. Performance might be sub-optimal! Config file not found at "
    f"/tuned/{OTHER}, /usr/lib/vllm/model_executor/layers/fused_moe/configs/{OTHER}"
)
CREATE = "https://github.com/sgl-project/sglang/tree/main/benchmark/kernels/fused_moe_triton"


def events(text):
    return [(file.event, file.name) for file in parsed_log(text).files]


def test_vllms_log_says_which_file_was_read_and_for_which_the_default_ran():
    log = parsed_log(f"INFO starting\n{READ}\n{READ}\n{DEFAULT}\n")
    assert [(file.event, file.path) for file in log.files] == [
        ("read", f"/tuned folder/{NAME}"),
        ("default", f"/tuned/{OTHER}"),
    ]
    assert (log.of(NAME).event, log.of(OTHER).event, log.of("E=1,N=1,device_name=x.json")) == ("read", "default", None)
    assert not log.all_read
    assert parsed_log(READ).all_read


def test_the_paths_of_older_vllm_stand_in_a_list():
    text = DEFAULT.replace("found at ", "found at ['").replace(", /usr", "', '/usr") + "']"
    assert events(text) == [("default", OTHER)]


def test_sglangs_four_texts_are_told_apart():
    found, other = "/c/configs/triton_3_6_0/", "/c/configs/triton_3_5_1/"
    assert events(f"Using MoE kernel config from {found}{SGLANG_NAME}.") == [("read", SGLANG_NAME)]
    fallback = (
        f"Config file not found at {found}{SGLANG_NAME}. Fallback to triton version 3.5.1 and use MoE kernel config "
        f"from {other}{SGLANG_NAME}. Performance might be sub-optimal!"
    )
    assert [(file.event, file.path) for file in parsed_log(fallback).files] == [
        ("other_triton", f"{other}{SGLANG_NAME}")
    ]
    reused = (
        f"Down MoE config file not found at {found}{SGLANG_DOWN}; reusing the tuned up-projection config without TMA. "
        "Performance might be sub-optimal."
    )
    assert events(reused) == [("reused", SGLANG_DOWN)]
    default = (
        "Using default MoE kernel config. Performance might be sub-optimal! Config file not found at "
        f"{found}{SGLANG_NAME}, you can create them with {CREATE}"
    )
    assert events(default) == [("default", SGLANG_NAME)]
    assert parsed_log(f"Using MoE kernel config from {found}{SGLANG_NAME}.\n{reused}").all_read
    assert not parsed_log(fallback).all_read


def test_the_chosen_kernels_and_deterministic_inference_are_read():
    text = "\x1b[36mINFO\x1b[0m Using FLASHINFER_CUTLASS Fp8 MoE backend out of potential backends: ['TRITON'].\n"
    assert parsed_log(text).kernels == ("FLASHINFER_CUTLASS",)
    assert parsed_log("Using TRITON Unquantized MoE backend out of potential backends: ['A'].").kernels == ("TRITON",)
    text = "Deterministic inference is enabled, using default MoE kernel config."
    assert parsed_log(text).deterministic
    assert not parsed_log(text).all_read


def test_a_profile_of_the_plugin_is_as_good_as_a_file():
    text = "INFO moetune: Triton experts E=32, N=2048: profile of deepseek-r1 under ep8-tp1-dp-allgather, 18 buckets"
    assert parsed_log(text).plugin == ("E=32, N=2048",)
    assert parsed_log(text).all_read
    assert not parsed_log(f"{text}\n{DEFAULT}").all_read
    none = "INFO moetune: Triton experts E=32, N=2048: no profile, the engine's own configuration runs"
    assert not parsed_log(none).plugin


def test_a_log_that_names_no_file_proves_no_hit():
    assert not parsed_log("INFO: Application startup complete.").all_read


def test_a_log_that_cannot_be_read_is_a_wrong_question(tmp_path):
    with pytest.raises(UsageError, match=r"--log .* cannot be read"):
        read_log(tmp_path / "none.log")
    path = tmp_path / "server.log"
    path.write_bytes(b"\xff" + READ.encode())
    assert read_log(path).all_read
