"""What of a launch line decides which tuned file the engine looks for."""

import json

import pytest

from moetune.errors import UsageError
from moetune.inputs.launch_table import read

SGLANG = "python -m sglang.launch_server --model-path"
R1 = f"{SGLANG} deepseek-ai/DeepSeek-R1 --tp 8"


@pytest.mark.parametrize(
    ("line", "experts", "size"),
    [
        ("vllm serve deepseek-ai/DeepSeek-R1 -tp 8", (256,), 256),
        ("vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep", (32,), 2048),
        ("vllm serve deepseek-ai/DeepSeek-R1 -tp 2 -dp 4 -ep --moe-backend deep_gemm", (32,), 2048),
        ("vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --all2all-backend deepep_low_latency", (32,), 2048),
        ("vllm serve Qwen/Qwen3-235B-A22B -dp 6 -ep", (22, 21), 1536),
        (R1, (257,), 256),
        (f"{R1} --disable-shared-experts-fusion", (256,), 256),
        (f"{R1} --ep 8", (32,), 2048),
        (f"{R1} --ep 8 --enforce-shared-experts-fusion", (33,), 2048),
        (f"{R1} --ep 4 --ep-num-redundant-experts 8", (66,), 1024),
        (f"{R1} --moe-a2a-backend deepep", (32,), 2048),
        (f"{R1} --enable-two-batch-overlap", (256,), 256),
        (f"{R1} --moe-runner-backend flashinfer_trtllm", (256,), 256),
        (f"{SGLANG} zai-org/GLM-4.5 --tp 8", (161,), 192),
        (f"{SGLANG} deepseek-ai/DeepSeek-V3.2 --tp 8", (256,), 256),
        (f"{SGLANG} Qwen/Qwen3-235B-A22B --tp 4", (128,), 384),
    ],
)
def test_the_experts_and_the_size_of_one_rank(line, experts, size):
    found = read(line)
    assert (found.num_experts, found.intermediate_size) == (experts, size)


@pytest.mark.parametrize(("architecture", "experts"), [("DeepseekV3ForCausalLM", 257), ("DeepseekV32ForCausalLM", 256)])
def test_the_architecture_of_a_config_decides_whether_shared_experts_are_fused(tmp_path, architecture, experts):
    config = {
        "model_type": "deepseek_v3", "architectures": [architecture], "n_routed_experts": 256, "num_experts_per_tok": 8,
        "hidden_size": 7168, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read(f"{SGLANG} {tmp_path} --tp 8").num_experts == (experts,)


def test_the_variables_and_flags_of_the_look_up():
    line = "VLLM_TUNED_CONFIG_FOLDER=/tuned VLLM_USE_DEEP_GEMM=0 vllm serve deepseek-ai/DeepSeek-R1 --moe-backend auto"
    found = read(line)
    assert (found.folder, found.named, found.deep_gemm, found.ignores_files) == ("/tuned", None, False, "")
    assert read("VLLM_BATCH_INVARIANT=1 vllm serve deepseek-ai/DeepSeek-R1").ignores_files
    found = read(f"SGLANG_MOE_CONFIG_DIR=/tuned {R1} --enable-deterministic-inference --moe-runner-backend cutlass")
    assert (found.folder, found.named, found.flag) == ("/tuned", "cutlass", "--moe-runner-backend")
    assert "deterministic" in found.ignores_files


def test_a_load_that_moetune_does_not_model_is_none():
    assert read(f"{R1} --moe-a2a-backend deepep").regime is None
    assert read("vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep").regime.dispatch == "allgather"


def test_options_override_the_line():
    found = read("vllm serve unheard/of -tp 2", {"model": "qwen3-30b-a3b", "precision": "fp16"})
    assert (found.layer.name, found.layer.precision.value, found.intermediate_size) == ("qwen3-30b-a3b", "fp16", 384)


def test_tensorrt_llm_has_no_such_file():
    with pytest.raises(UsageError, match="TensorRT-LLM, which reads no tuned file"):
        read("trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8")
