"""Launch lines that were misread once, and lines that must stay what they are: each its regime or a refusal."""

from pathlib import Path

import pytest

from moetune.errors import MoetuneError
from moetune.inputs.launch import read
from moetune.inputs.options import resolve

SETTINGS = Path(__file__).parent.parent / "data" / "launch"

# line → what it stands for: model, precision, then fields of the regime, `backend`, or a part of a warning.
READ = {
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep > log.txt": {"ep_size": 8, "tp_size": 1, "dispatch": "allgather"},
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep # expert parallel": {"ep_size": 8, "dispatch": "allgather"},
    "vllm serve Qwen/Qwen3-235B-A22B -tp 8 --enable-expert-parallel;": {"ep_size": 8, "tp_size": 1},
    "trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 8 --enable_attention_dp > log 2>&1": {
        "ep_size": 8,
        "attention_dp": True,
        "layout": "packed",
    },
    "vllm serve Qwen/Qwen3-30B-A3B --tensor-parallel-size 2 # use --data-parallel-size 4 for more": {
        "tp_size": 2,
        "attention_dp": False,
    },
    "# Don't use TP here\nvllm serve Qwen/Qwen3-30B-A3B -dp 2 --enable-expert-parallel": {
        "ep_size": 2,
        "dispatch": "allgather",
    },
    "vllm serve --async-scheduling openai/gpt-oss-120b -tp 2": {"model": "gpt-oss-120b", "tp_size": 2},
    "vllm serve moonshotai/Kimi-K2-Thinking -tp 8 --enable-expert-parallel": {"precision": "mxint4", "ep_size": 8},
    "trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 8 --extra_llm_api_options settings/flow.yaml": {
        "attention_dp": True,
        "backend": "flashinfer-trtllm-routed",
    },
    "trtllm-serve deepseek-ai/DeepSeek-R1 --extra_llm_api_options settings/json.yaml": {
        "ep_size": 8,
        "attention_dp": True,
        "backend": "flashinfer-trtllm-routed",
    },
    "trtllm-serve deepseek-ai/DeepSeek-R1 --extra_llm_api_options settings/eplb.yaml": {
        "ep_size": 16,
        "redundant_experts": 32,
        "tune_max_num_tokens": 512,
    },
    "trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 8 --extra_llm_api_options settings/crlf.yaml": {
        "attention_dp": True,
        "backend": "flashinfer-trtllm-routed",
    },
    "trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 8 --extra_llm_api_options settings/tabs.yaml": {
        "backend": "flashinfer-trtllm-routed",
        "tune_max_num_tokens": 8192,
    },
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --moe-backend flashinfer_trtllm --max-num-batched-tokens 512": {
        "tune_max_num_tokens": 8192,
        "ladder": "hybrid",
        "backend": "flashinfer-trtllm",
    },
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --moe-backend flashinfer_cutlass": {"tune_max_num_tokens": 65536},
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --moe-backend flashinfer_trtllm": {"tune_max_num_tokens": 131072},
    "VLLM_USE_FLASHINFER_MOE_FP8=1 VLLM_FLASHINFER_MOE_BACKEND=latency "
    "vllm serve Qwen/Qwen3-Next-80B-A3B-Instruct-FP8 -tp 4": {"backend": "flashinfer-trtllm", "ladder": "hybrid"},
    "vllm serve Qwen/Qwen3-30B-A3B --dtype float16 -tp 2": {"precision": "fp16"},
    "python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8 --enable-flashinfer-trtllm-moe": {
        "backend": "flashinfer-trtllm"
    },
    "TRTLLM_FORCE_COMM_METHOD=ALLGATHER trtllm-serve openai/gpt-oss-120b --tp_size 6 --ep_size 6 "
    "--extra_llm_api_options settings/block.yaml": {"uneven_shards": True, "dispatch": "allgather"},
    "vllm serve --config settings/vllm.yaml": {
        "model": "qwen3-235b-a22b",
        "ep_size": 8,
        "layout": "deduplicated",
        "redundant_experts": 16,
    },
    "vllm serve Qwen/Qwen3-235B-A22B --config settings/vllm_flow.yaml": {"redundant_experts": 16, "ep_size": 8},
    "vllm serve --config settings/vllm_eplist.yaml": {"ep_size": 8, "dispatch": "allgather"},
    "docker run --gpus all --ipc=host -p 8000:8000 vllm/vllm-openai:v0.20.2 --model Qwen/Qwen3-235B-A22B "
    "--data-parallel-size 8 --enable-expert-parallel": {"ep_size": 8, "attention_dp": True},
    "python3 -m dynamo.vllm --model deepseek-ai/DeepSeek-R1 --data-parallel-size 8 --enable-expert-parallel": {
        "ep_size": 8,
        "attention_dp": True,
    },
    'CMD ["vllm", "serve", "Qwen/Qwen3-30B-A3B", "--tensor-parallel-size", "2"]': {"tp_size": 2},
    "bash -lc 'export A=1; vllm serve Qwen/Qwen3-30B-A3B -dp 2 -ep 2>&1 | tee log'": {"ep_size": 2},
    "EP=--enable-expert-parallel\nvllm serve Qwen/Qwen3-30B-A3B -dp 4 $EP": {"ep_size": 4},
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --moe-backend flashinfer_cutlass --max-num-batched-tokens 25.6k": {
        "tune_max_num_tokens": 204800
    },
    "python -m sglang.launch_server --model-path Qwen/Qwen3-235B-A22B --tp 8 --attn-dp-size 8 --ep 4": {
        "ep_size": 4,
        "tp_size": 2,
        "attention_dp": True,
        "dispatch": "allgather",
    },
    "sglang serve --model-path Qwen/Qwen3-235B-A22B --tp 8 --ep 8 --dp 2": {"ep_size": 8, "attention_dp": False},
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep --hf-overrides '{\"max_position_embeddings\": 9}'": {"ep_size": 8},
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep --expert-placement-strategy round_robin": {"ep_size": 8},
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep --shiny-new-flag 3": {
        "ep_size": 8,
        "warning": "no flag --shiny-new-flag",
    },
    "vllm serve Qwen/Qwen3-30B-A3B -tp ${TP:-2}": {"tp_size": 2, "warning": "its default is taken"},
    "vllm serve Qwen/Qwen3-30B-A3B -tp 2 --port $PORT": {"tp_size": 2},
    # these were read rightly
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep": {"ep_size": 8, "attention_dp": True, "dispatch": "allgather"},
    "vllm serve deepseek-ai/DeepSeek-R1 -tp 8 -dp 2 --enable-expert-parallel "
    "--all2all-backend=deepep_high_throughput --max-num-batched-tokens 16384": {
        "ep_size": 16,
        "layout": "deduplicated",
        "buckets": 36,
    },
    "VLLM_ALL2ALL_BACKEND=deepep_high_throughput vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel": {
        "layout": "deduplicated"
    },
    "vllm serve deepseek-ai/DeepSeek-R1 --data-parallel-size=16 --data-parallel-size-local=8 --headless "
    "--data-parallel-start-rank=8 --enable-expert-parallel": {"ep_size": 16},
    "vllm serve deepseek-ai/DeepSeek-R1 -tp 8 --pipeline-parallel-size 2 --enable-expert-parallel": {"ep_size": 8},
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep --enable-eplb --eplb-config.num_redundant_experts=32": {
        "redundant_experts": 32
    },
    "docker run --gpus all -e VLLM_ALL2ALL_BACKEND=deepep_high_throughput vllm/vllm-openai:latest "
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel": {"layout": "deduplicated"},
    "python -m sglang.launch_server --model-path moonshotai/Kimi-K2-Instruct --tp 8 --dp 4 --ep 4 "
    "--enable-dp-attention": {"ep_size": 4, "tp_size": 2, "dispatch": "allgather"},
    "python3 -m sglang.launch_server --model-path nvidia/DeepSeek-R1-FP4 --quantization modelopt_fp4 --tp 8 "
    "--enable-ep-moe": {"ep_size": 8, "precision": "nvfp4"},
    "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8 --dp 8 --enable-dp-attention --ep 8 "
    "--moe-a2a-backend flashinfer --moe-runner-backend flashinfer_cutlass --chunked-prefill-size 16384": {
        "layout": "pool",
        "ladder": "hybrid",
        "tune_max_num_tokens": 16384,
        "backend": "flashinfer-cutlass",
    },
    "trtllm-llmapi-launch trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 16 --ep_size 16 "
    "--extra_llm_api_options settings/block.yaml": {
        "ep_size": 16,
        "layout": "packed",
        "ladder": "pow2/16",
        "backend": "flashinfer-trtllm-routed",
    },
    "trtllm-serve nvidia/GLM-5-NVFP4 --extra_llm_api_options settings/eplb256.yaml": {
        "ep_size": 16,
        "redundant_experts": 0,
        "precision": "nvfp4",
    },
    "vllm serve moonshotai/Kimi-K2-Instruct --tensor-parallel-size 8 --pipeline-parallel-size 2 --dtype bfloat16 "
    "--quantization fp8 --max-num-batched-tokens 1024": {
        "precision": "fp8_block",
        "tp_size": 8,
        "tune_max_num_tokens": 1024,
    },
    "vllm serve Qwen/Qwen3-235B-A22B --config settings/vllm_nested.yaml": {"redundant_experts": 16},
}

REFUSED = {
    "vllm serve Qwen/Qwen3-30B-A3B -tp 4 &\nvllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel": (
        r"2 servers: \(1\) vllm serve Qwen/Qwen3-30B-A3B -tp 4; \(2\) vllm serve Qwen/Qwen3-235B"
    ),
    "vllm serve openai/gpt-oss-120b --tensor-parallel-size 8 $EP --max-num-seqs 128": r"\$EP has no value",
    'vllm serve openai/gpt-oss-120b "${ARGS[@]}"': r"\$\{ARGS\[@\]\} has no value",
    "vllm serve Qwen/Qwen3-30B-A3B -tp $TP": r"--tensor-parallel-size: \$TP has no value",
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-paralel": (
        "vllm serve has no flag --enable-expert-paralel .*nearest is --enable-expert-parallel"
    ),
    "vllm serve Qwen/Qwen3-30B-A3B —tensor-parallel-size 2": "begins with an em dash",
    "VLLM_ROCM_USE_AITER=1 vllm serve Qwen/Qwen3-235B-A22B-FP8 -tp 8 --enable-expert-parallel": "VLLM_ROCM_USE_AITER",
    "SGLANG_USE_AITER=1 sglang serve --model-path Qwen/Qwen3-235B-A22B-FP8 --tp 8": "SGLANG_USE_AITER",
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 --enable-expert-parallel --expert-placement-strategy round_robin": (
        "round_robin"
    ),
    "TRTLLM_FORCE_ALLTOALL_METHOD=DeepEPLowLatency trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 8 "
    "--config settings/block.yaml": "deepep_low_latency cannot be tuned",
    "TRTLLM_FORCE_COMM_METHOD=DEEPEPLOWLATENCY trtllm-serve deepseek-ai/DeepSeek-R1 --tp_size 8 --ep_size 8 "
    "--config settings/block.yaml": "deepep_low_latency cannot be tuned",
    "vllm serve deepseek-ai/DeepSeek-R1 -tp 0": "--tensor-parallel-size must be at least 1",
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 --enable-expert-parallel --enable-eplb --eplb-config '[1]'": (
        r"--eplb-config must be a JSON object, given '\[1\]'"
    ),
    "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep --hf-overrides '{\"num_experts\": 64}'": "changes num_experts",
    "vllm serve Qwen/Qwen3-235B-A22B 8 -ep": "'8': it belongs to no flag",
    # these were refused rightly
    "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 --enable-expert-parallel --all2all-backend mori_low_latency": (
        "vllm:mori_low_latency cannot be tuned"
    ),
    "python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --enable-deepep-moe --deepep-mode auto "
    "--tp 16 --dp 16 --enable-dp-attention --ep-num-redundant-experts 32": "sglang:deepep cannot be tuned",
}


@pytest.mark.parametrize("line", READ, ids=range(len(READ)))
def test_a_line_is_read_as_its_engine_reads_it(line, monkeypatch):
    monkeypatch.chdir(SETTINGS)
    expected = dict(READ[line])
    launch = read(line)
    backend = launch.options.pop("backend", None)
    layer, regime, *_ = resolve(**launch.options)
    found = {
        **regime.model_dump(mode="json"),
        "uneven_shards": regime.uneven_shards,
        "model": layer.name,
        "precision": layer.precision.value,
        "backend": backend,
        "buckets": len(regime.buckets),
    }
    if warning := expected.pop("warning", None):
        assert warning in " ".join(launch.warnings)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("line", REFUSED, ids=range(len(REFUSED)))
def test_a_line_that_is_not_understood_is_refused_by_name(line, monkeypatch):
    monkeypatch.chdir(SETTINGS)
    with pytest.raises(MoetuneError, match=REFUSED[line]):
        resolve(**{name: value for name, value in read(line).options.items() if name != "backend"})


def test_a_precision_beside_the_line_answers_for_the_model_s():
    launch = read("vllm serve zai-org/GLM-4.7-FP8 -tp 4", {"precision": "fp8_block"})
    assert resolve(**launch.options, precision="fp8_block").layer.precision == "fp8_block"
