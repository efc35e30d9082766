"""Launch lines from the engines' own documents, word for word."""

import pytest

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.launch import read
from moetune.inputs.options import resolve
from moetune.inputs.presets import preset
from moetune.spec.regime import Regime

VLLM_EP = "https://docs.vllm.ai/en/latest/serving/expert_parallel_deployment/"
VLLM_RECIPE = "https://docs.vllm.ai/projects/recipes/en/latest/DeepSeek/DeepSeek-V3.html"
SGLANG_EP = "https://docs.sglang.io/advanced_features/expert_parallelism.html"
SGLANG_V32 = "https://huggingface.co/deepseek-ai/DeepSeek-V3.2-Exp/commit/fd33dda13987c4ec2bd43d7d4318046a4f220ca9"
SGLANG_R1 = "https://mintlify.com/sgl-project/sglang/models/deepseek"
TRTLLM_R1 = "https://nvidia.github.io/TensorRT-LLM/examples/deepseek_r1_reasoning_parser.html"


def options(line, beside=None):
    return read(line, beside).options


DOCUMENTED = {
    "vllm DP+EP": (
        VLLM_EP,
        r"""
vllm serve deepseek-ai/DeepSeek-V3-0324 \
    --tensor-parallel-size 1 \       # Tensor parallelism across 1 GPU
    --data-parallel-size 8 \         # Data parallelism across 8 processes
    --enable-expert-parallel \       # Enable expert parallelism
    --all2all-backend pplx           # Use pplx communication backend
""",
        "deepseek-v3",
        Regime(ep_size=8, attention_dp=True, dispatch="allgather", ladder="adaptive"),
    ),
    "vllm EPLB": (
        VLLM_EP,
        r"""
vllm serve deepseek-ai/DeepSeek-V3-0324 \
    --tensor-parallel-size 1 \       # Tensor parallelism
    --data-parallel-size 8 \         # Data parallelism
    --enable-expert-parallel \       # Enable EP
    --all2all-backend pplx \         # Use pplx communication backend
    --enable-eplb \                  # Enable load balancer
    --eplb-config '{"window_size":1000,"step_interval":3000,"num_redundant_experts":2,"log_balancedness":true}'
""",
        "deepseek-v3",
        Regime(
            ep_size=8,
            attention_dp=True,
            dispatch="allgather",
            redundant_experts=2,
            uneven_shards=True,
            ladder="adaptive",
        ),
    ),
    "vllm TP+EP": (
        VLLM_RECIPE,
        r"""
vllm serve deepseek-ai/DeepSeek-R1-0528 \
  --trust-remote-code \
  --tensor-parallel-size 8 \
  --enable-expert-parallel
""",
        "deepseek-r1",
        Regime(ep_size=8, ladder="adaptive"),
    ),
    "vllm DP8+EP": (
        VLLM_RECIPE,
        r"""
vllm serve deepseek-ai/DeepSeek-R1-0528 \
  --trust-remote-code \
  --data-parallel-size 8 \
  --enable-expert-parallel
""",
        "deepseek-r1",
        Regime(ep_size=8, attention_dp=True, dispatch="allgather", ladder="adaptive"),
    ),
    "vllm EPLB by single arguments": (
        VLLM_EP,
        r"""
vllm serve Qwen/Qwen3-30B-A3B \
        --enable-eplb \
        --eplb-config.window_size 1000 \
        --eplb-config.step_interval 3000 \
        --eplb-config.num_redundant_experts 2 \
        --eplb-config.log_balancedness true
""",
        "qwen3-30b-a3b",
        Regime(redundant_experts=2, ladder="adaptive"),
    ),
    "sglang DP attention": (
        SGLANG_V32,
        "python -m sglang.launch_server --model deepseek-ai/DeepSeek-V3.2-Exp --tp 8 --dp 8 --enable-dp-attention",
        "deepseek-v3.2",
        Regime(tp_size=8, attention_dp=True, dispatch="allgather", ladder="adaptive"),
    ),
    "sglang TP": (
        SGLANG_R1,
        r"""
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-R1 \
  --tp 16 \
  --trust-remote-code
""",
        "deepseek-r1",
        Regime(tp_size=16, ladder="adaptive"),
    ),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_line_stands_for_its_layer_and_regime(name):
    _, line, model, regime = DOCUMENTED[name]
    asked = resolve(**options(line))
    assert asked.layer.name == model
    assert asked.regime == regime


def trtllm(tmp_path, settings, line=""):
    (tmp_path / "config.yml").write_text(settings)
    return options(
        f"""
trtllm-serve \\
    deepseek-ai/DeepSeek-R1 \\
    --host localhost --port 8000 \\
    --trust_remote_code \\
    --max_batch_size 1024 --max_num_tokens 8192 \\
    --tp_size 8 --ep_size 8 --pp_size 1 \\
    --config {tmp_path}/config.yml \\
    --reasoning_parser deepseek-r1 {line}
"""
    )


DOCUMENTED_SETTINGS = """\
cuda_graph_config:
    enable_padding: true
    max_batch_size: 512
enable_attention_dp: true
kv_cache_config:
    dtype: fp8
    free_gpu_memory_fraction: 0.8
stream_interval: 10
"""


def test_tensorrt_llm_s_documented_line_and_settings(tmp_path):
    asked = resolve(**trtllm(tmp_path, DOCUMENTED_SETTINGS))  # TRTLLM_R1, without its moe_config
    assert asked.layer == preset("deepseek-r1")
    assert asked.regime == Regime(ep_size=8, attention_dp=True, layout="packed", ladder="pow2/8")


def test_tensorrt_llm_s_documented_kernels_are_not_tuned(tmp_path):
    with pytest.raises(UnsupportedError, match="DEEPGEMM selects MoE kernels that moetune does not tune"):
        trtllm(tmp_path, DOCUMENTED_SETTINGS + "moe_config:\n    backend: DEEPGEMM\n")


def test_tensorrt_llm_s_settings_override_its_flags(tmp_path):
    settings = "moe_expert_parallel_size: 4\nmax_num_tokens: 2048\nmoe_config:\n  backend: TRTLLM  # Blackwell\n"
    found = trtllm(tmp_path, settings)
    assert {name: found[name] for name in ("ep", "tp", "dispatch", "tune_max_num_tokens", "backend")} == {
        "ep": 4,
        "tp": 2,
        "dispatch": "trtllm:none",
        "tune_max_num_tokens": 2048,
        "backend": "flashinfer-trtllm",
    }


def test_tensorrt_llm_s_communication_method_is_the_dispatcher(tmp_path):
    (tmp_path / "dp.yml").write_text("enable_attention_dp: true\nmoe_config:\n  backend: TRTLLM\n")
    line = "TRTLLM_FORCE_COMM_METHOD=NVLINK_ONE_SIDED trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 8"
    found = options(f"{line} --extra_llm_api_options {tmp_path}/dp.yml")
    assert found["backend"] == "flashinfer-trtllm-routed"
    assert resolve(**{name: value for name, value in found.items() if name != "backend"}).regime.layout == "pool"


def test_sglang_s_documented_deepep_line_says_why_it_cannot_be_tuned():
    line = "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --moe-a2a-backend deepep --tp 8 --ep 8"
    with pytest.raises(UnsupportedError, match="has no tactics to tune"):  # SGLANG_EP
        resolve(**options(line))
    with pytest.raises(UnsupportedError, match="deep_gemm"):
        options(f"{line} --moe-runner-backend deep_gemm")


def test_flashinfer_s_kernels_set_their_backend_and_ladder():
    line = "sglang serve --model-path nvidia/DeepSeek-R1-0528-FP4 --tp 4 --ep 4 --moe-runner-backend flashinfer_trtllm"
    assert options(line) == {
        "model": "deepseek-r1",
        "precision": "nvfp4",
        "ep": 4,
        "tp": 1,
        "dispatch": "sglang:none",
        "dp": False,
        "backend": "flashinfer-trtllm",
        "ladder": "hybrid",
    }
    vllm = options("vllm serve openai/gpt-oss-120b -tp 2 --moe-backend flashinfer_cutlass")
    assert (vllm["backend"], vllm["ladder"], vllm["tp"]) == ("flashinfer-cutlass", "hybrid", 2)


def test_the_maximum_counts_the_rows_of_all_ranks():
    line = "vllm serve Qwen/Qwen3-30B-A3B -dp 4 --enable-expert-parallel --max-num-batched-tokens 4k"
    assert options(line)["tune_max_num_tokens"] == 16000
    sglang = "python -m sglang.launch_server --model Qwen/Qwen3-30B-A3B --tp 4 --dp 4 --enable-dp-attention"
    assert options(f"{sglang} --chunked-prefill-size 16384")["tune_max_num_tokens"] == 16384
    assert "tune_max_num_tokens" not in options(f"{sglang} --chunked-prefill-size -1")


@pytest.mark.parametrize(
    ("flags", "capacity"),
    [
        ("-dp 8 -ep", "2048"),
        ("-dp 4 -tp 2 -ep", "2048"),
        ("-dp 8 -ep --max-num-batched-tokens 64", "512"),
        ("-dp 8 -ep --performance-mode throughput", "4096"),
    ],
)
@pytest.mark.parametrize("word", ["deepep_low_latency", "nixl_ep"])
def test_the_capacity_of_an_expert_major_buffer_is_the_tokens_of_all_ranks(word, flags, capacity):
    found = options(f"vllm serve Qwen/Qwen3-30B-A3B {flags} --all2all-backend {word}")
    assert (found["ladder"], found.get("tune_max_num_tokens")) == (capacity, None)
    regime = resolve(**found).regime
    assert (regime.layout, regime.capacity, regime.ep_size) == ("batched", int(capacity), 8)


@pytest.mark.parametrize("named", ["triton", "batched_triton", "batched-triton"])
def test_vllms_triton_kernel_for_expert_major_rows_is_the_batched_one(named):
    line = f"vllm serve Qwen/Qwen3-30B-A3B -dp 8 -ep --moe-backend {named}"
    assert options(f"{line} --all2all-backend deepep_low_latency")["backend"] == "batched-triton"
    if named == "triton":
        assert options(line)["backend"] == "triton"


def test_without_expert_parallelism_vllm_cuts_the_experts_over_all_ranks():
    found = options("vllm serve Qwen/Qwen3-30B-A3B -tp 2 -dp 4 --all2all-backend deepep_low_latency")
    assert (found["ep"], found["tp"], found["dispatch"]) == (1, 8, "vllm:allgather_reducescatter")


def test_vllm_s_variable_names_the_dispatcher_and_its_flag_wins():
    line = "VLLM_ALL2ALL_BACKEND=deepep_high_throughput vllm serve Qwen/Qwen3-30B-A3B -dp 8 --enable-expert-parallel"
    assert options(line)["dispatch"] == "vllm:deepep_high_throughput"
    assert options(f"{line} --all2all-backend=naive")["dispatch"] == "vllm:naive"


def test_vllm_s_uneven_shards_stay_possible():
    regime = resolve(**options("vllm serve Qwen/Qwen3-30B-A3B -tp 6 --enable-expert-parallel")).regime
    assert regime.uneven_shards
    assert regime.dispatch == "none"


def test_a_switch_takes_no_model_for_its_value():
    found = options("vllm serve --enable-expert-parallel Qwen/Qwen3-30B-A3B -tp 8")
    assert (found["model"], found["ep"]) == ("qwen3-30b-a3b", 8)
    with pytest.raises(UsageError, match="'false': it belongs to no flag"):
        options("vllm serve Qwen/Qwen3-30B-A3B -tp 8 --enable-expert-parallel false")
    with pytest.raises(UsageError, match="takes no value"):
        options("vllm serve Qwen/Qwen3-30B-A3B -tp 8 --enable-expert-parallel=false")
    assert options("vllm serve Qwen/Qwen3-30B-A3B -tp 8 --no-enable-expert-parallel")["ep"] == 1


def test_vllm_s_settings_file_is_read_and_its_flags_win(tmp_path):
    (tmp_path / "c.yaml").write_text("tensor-parallel-size: 4\nenable-expert-parallel: true\n")
    line = f"vllm serve Qwen/Qwen3-30B-A3B --config {tmp_path}/c.yaml"
    assert options(line)["ep"] == 4
    assert options(f"{line} --tensor-parallel-size 8")["ep"] == 8


def test_options_beside_the_line_win():
    line = "vllm serve no/such-model -dp 8 --enable-expert-parallel --moe-backend marlin --quantization awq"
    beside = {"model": "qwen3-30b-a3b", "precision": "bf16", "backend": "triton", "ep": 4, "dp": None}
    assert options(line, beside) == {"tp": 1, "dispatch": "vllm:allgather_reducescatter"}
    assert "dp" not in options("vllm serve Qwen/Qwen3-30B-A3B -tp 8", {"dispatch": "alltoall"})


@pytest.mark.parametrize(
    ("model", "name", "precision"),
    [
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b-a22b", None),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8", "qwen3-235b-a22b", "fp8_block"),
        ("nvidia/Qwen3-235B-A22B-NVFP4", "qwen3-235b-a22b", "nvfp4"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseek-v3.2", None),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2", None),
        ("qwen3-30b-a3b", "qwen3-30b-a3b", None),
    ],
)
def test_a_repository_is_its_preset_or_a_variant(model, name, precision):
    found = options(f"vllm serve {model}")
    assert (found["model"], found.get("precision")) == (name, precision)


def test_a_path_here_stays_a_path(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 2, "hidden_size": 64, '
        '"moe_intermediate_size": 32, "hidden_act": "silu", "norm_topk_prob": true}'
    )
    assert options(f"vllm serve {tmp_path} --quantization fp8")["precision"] == "fp8_tensor"
    assert resolve(**options(f"vllm serve {tmp_path}")).layer.num_experts == 16


def test_quantization_makes_another_precision_only_of_bf16_weights():
    assert options("vllm serve Qwen/Qwen3-30B-A3B --quantization fp8")["precision"] == "fp8_tensor"
    assert "precision" not in options("vllm serve deepseek-ai/DeepSeek-R1 --quantization fp8")
    assert options("sglang serve --model-path deepseek-ai/DeepSeek-R1 --quantization modelopt_fp4")["precision"] == (
        "nvfp4"
    )


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("python serve.py --model x", UsageError, "no server.*It reads vllm serve MODEL"),
        ("vllm serve", UsageError, "names no model"),
        ("vllm serve 'unclosed", UsageError, "' is not closed"),
        (
            "vllm serve meta-llama/Llama-3-8B",
            UsageError,
            "'meta-llama/Llama-3-8B' is neither an existing path.*--model",
        ),
        (
            "vllm serve SomeOne/Qwen3-30B-A3B-FP8",
            UsageError,
            "nor a repository that moetune knows.*--model PATH of its config.json",
        ),
        ("vllm serve Qwen/Qwen3-30B-A3B -tp eight", UsageError, "must be an integer, given 'eight'"),
        ("vllm serve Qwen/Qwen3-30B-A3B --quantization awq", UnsupportedError, "--quantization awq"),
        ("vllm serve Qwen/Qwen3-30B-A3B --enable-eplb --eplb-config '{'", UsageError, "JSON object"),
        ("vllm serve Qwen/Qwen3-30B-A3B --moe-backend deep_gemm", UnsupportedError, "deep_gemm.*--backend"),
        ("trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 3", UsageError, "ep_size 3 must divide tp_size 8"),
        ("trtllm-serve deepseek-ai/DeepSeek-R1 --config no.yml", UsageError, "no.yml: the file cannot be read"),
        (
            "sglang serve --model-path Qwen/Qwen3-30B-A3B --tp 8 --ep 3",
            UsageError,
            "--ep-size 3.*must divide --tp-size 8",
        ),
    ],
)
def test_a_line_that_cannot_be_read_says_what_to_do(line, error, said):
    with pytest.raises(error, match=said):
        options(line)


@pytest.mark.parametrize(
    ("line", "beside", "flags"),
    [
        (
            "python -m sglang.launch_server --model-path Qwen/Qwen3-30B-A3B --tp 16 --ep 16 --dp 16 "
            "--enable-dp-attention --port 1",
            {},
            ("--tp-size 16", "--ep-size 16", "--dp-size 16", "--enable-dp-attention", "no --moe-a2a-backend"),
        ),
        (
            "python -m sglang.launch_server --model-path Qwen/Qwen3-30B-A3B --tp 8 --moe-a2a-backend none",
            {},
            ("--tp-size 8", "--moe-a2a-backend none"),
        ),
        (
            "vllm serve Qwen/Qwen3-30B-A3B -tp 8 --enable-expert-parallel",
            {},
            ("--tensor-parallel-size 8", "--enable-expert-parallel", "no --all2all-backend"),
        ),
        (
            "VLLM_ALL2ALL_BACKEND=pplx vllm serve Qwen/Qwen3-30B-A3B -dp 8 --enable-expert-parallel",
            {},
            ("--data-parallel-size 8", "--enable-expert-parallel", "VLLM_ALL2ALL_BACKEND=pplx"),
        ),
        ("vllm serve Qwen/Qwen3-30B-A3B -tp 8", {"dispatch": "none"}, ("--tensor-parallel-size 8",)),
        ("trtllm-serve Qwen/Qwen3-30B-A3B --tp_size 8", {}, ("--tensor-parallel-size 8",)),
    ],
)
def test_the_flags_that_decide_the_deployment_are_named(line, beside, flags):
    assert read(line, beside).flags == flags


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vllm serve Qwen/Qwen3-30B-A3B -dp 8 -ep --enable-eplb", "--enable-eplb moves experts between ranks"),
        (
            "sglang serve --model-path Qwen/Qwen3-30B-A3B --tp 8 --ep-size 8 --enable-eplb "
            "--ep-num-redundant-experts 16 --eplb-algorithm elasticity_aware",
            "--eplb-algorithm elasticity_aware has another rule. The copies are placed as with deepseek.",
        ),
    ],
)
def test_a_balancer_that_places_experts_otherwise_is_a_warning_under_a_skew(line, said):
    for spelled in ("zipf:1", "replay:a.npz"):
        assert any(said in warning for warning in read(line, {"distribution": spelled}).warnings)
    assert not any(said in warning for warning in read(line).warnings)


SGLANG_RETURNS = "sglang serve --model-path Qwen/Qwen3-30B-A3B --tp 8 --enable-return-routed-experts"


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        (
            f"{SGLANG_RETURNS} --moe-runner-backend flashinfer_trtllm",
            "Start it with --moe-runner-backend flashinfer_trtllm_routed, to which SGLang passes the ids",
        ),
        (
            f"{SGLANG_RETURNS.replace('Qwen/Qwen3-30B-A3B', 'openai/gpt-oss-120b')} "
            "--moe-runner-backend flashinfer_mxfp4",
            "Select kernels to which SGLang passes the ids.",
        ),
    ],
)
def test_experts_that_the_kernel_chooses_are_not_returned_by_sglang(line, instead):
    (warning,) = (each for each in read(line).warnings if "--enable-return-routed-experts" in each)
    assert "SGLang does not see them" in warning
    assert instead in warning


@pytest.mark.parametrize(
    "line",
    [
        f"{SGLANG_RETURNS} --moe-runner-backend flashinfer_trtllm_routed",
        f"{SGLANG_RETURNS} --moe-runner-backend flashinfer_trtllm --moe-a2a-backend flashinfer --dp 8 "
        "--enable-dp-attention",
        f"{SGLANG_RETURNS} --moe-runner-backend triton",
        SGLANG_RETURNS.replace("--enable-return-routed-experts", "--moe-runner-backend flashinfer_trtllm"),
        "vllm serve Qwen/Qwen3-30B-A3B -tp 8 --enable-return-routed-experts --moe-backend flashinfer_trtllm",
    ],
)
def test_experts_that_the_engine_chooses_or_the_kernel_writes_are_returned(line):
    assert not any("--enable-return-routed-experts" in warning for warning in read(line).warnings)


@pytest.mark.parametrize("algorithm", ["auto", "deepseek", "deepseek_hierarchical"])
def test_a_balancer_whose_rule_moetune_has_is_no_warning(algorithm):
    line = (
        "sglang serve --model-path Qwen/Qwen3-30B-A3B --tp 8 --ep-size 8 --enable-eplb --ep-num-redundant-experts 16 "
        f"--eplb-algorithm {algorithm}"
    )
    assert not any("--eplb-algorithm" in warning for warning in read(line, {"distribution": "zipf:1"}).warnings)
