"""Which MoE kernels an engine chooses, and whether these read a tuned file."""

import pytest

from moetune.inputs.engine_kernels import block_shape, capability_of, chosen
from moetune.inputs.launch_table import read

R1, QWEN = "deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-235B-A22B"
VLLM, SGLANG = "vllm serve", "python -m sglang.launch_server --model-path"


def kernels(line, capability=(9, 0)):
    return chosen(read(line), capability)


@pytest.mark.parametrize(
    ("line", "capability"),
    [
        (f"{VLLM} {QWEN} -dp 8 -ep", (9, 0)),
        (f"{VLLM} {QWEN} -dp 8 -ep", (8, 0)),
        (f"{VLLM} {QWEN} -dp 8 -ep --moe-backend triton", (10, 0)),
        (f"{VLLM} {R1} -tp 8", (9, 0)),
        (f"{VLLM} {R1} -dp 8 -ep --moe-backend triton", (9, 0)),
        (f"VLLM_USE_DEEP_GEMM_E8M0=0 {VLLM} {R1} -tp 8 --moe-backend deep_gemm", (9, 0)),
        (f"{VLLM} {R1} -tp 8", (12, 0)),
        (f"{VLLM} {QWEN} -tp 8 --quantization fp8", (9, 0)),
        (f"{SGLANG} {R1} --tp 8", (9, 0)),
        (f"{SGLANG} {QWEN} --tp 8 --ep 8", (9, 0)),
        (f"{SGLANG} {R1} --tp 8 --moe-runner-backend flashinfer_cutlass", (9, 0)),
        (f"{SGLANG} {R1} --tp 8 --moe-runner-backend triton", (10, 0)),
    ],
)
def test_triton_reads_a_file(line, capability):
    found = kernels(line, capability)
    assert (found.name, found.reads, found.most_rows, found.remedy) == ("Triton", "yes", None, "")


@pytest.mark.parametrize(
    ("line", "capability"),
    [
        (f"{VLLM} {QWEN} -dp 8 -ep --all2all-backend deepep_low_latency", (9, 0)),
        (f"{VLLM} {QWEN} -dp 8 -ep --all2all-backend nixl_ep", (10, 0)),
        (f"{VLLM} {R1} -dp 8 -ep --all2all-backend deepep_low_latency --moe-backend triton", (9, 0)),
        (f"{VLLM} {R1} -dp 8 -ep --all2all-backend nixl_ep --moe-backend batched_triton", (9, 0)),
    ],
)
def test_the_batched_triton_kernel_reads_a_file_too(line, capability):
    found = kernels(line, capability)
    assert (found.name, found.reads, found.remedy) == ("batched Triton", "yes", "")


@pytest.mark.parametrize(
    ("line", "capability", "name"),
    [
        (f"{VLLM} {R1} -dp 8 -ep", (9, 0), "FlashInfer's CUTLASS kernels"),
        (f"{VLLM} {R1} -tp 8", (10, 0), "FlashInfer's kernels"),
        (f"{VLLM} {QWEN} -tp 8", (10, 0), "FlashInfer's kernels"),
        (f"{VLLM} {R1} -tp 8", (8, 0), "Marlin"),
        (f"{VLLM} {R1} -dp 8 -ep --all2all-backend deepep_low_latency", (9, 0), "DeepGEMM"),
        (f"{VLLM} {R1} -dp 8 -ep --moe-backend flashinfer_cutlass", (9, 0), "flashinfer_cutlass"),
        (f"{VLLM} {R1} -dp 8 -ep --moe-backend deep_gemm", (10, 0), "DeepGEMM"),
        (f"{VLLM} {R1} -tp 8 --moe-backend deep_gemm", (9, 0), "DeepGEMM"),
        (f"{VLLM} {QWEN} -dp 8 -ep --all2all-backend flashinfer_nvlink_one_sided", (9, 0), "FlashInfer's kernels"),
        (f"{VLLM} openai/gpt-oss-120b", (9, 0), "OpenAI's triton_kernels"),
        (f"VLLM_BATCH_INVARIANT=1 {VLLM} {QWEN}", (9, 0), "Triton by its default configuration"),
        (f"VLLM_ROCM_USE_AITER=1 {VLLM} {QWEN}", (9, 0), "AITER's kernels"),
        (f"{SGLANG} {R1} --tp 8 --moe-a2a-backend deepep", (9, 0), "DeepGEMM"),
        (f"{SGLANG} {R1} --tp 8 --moe-runner-backend deep_gemm", (9, 0), "deep_gemm"),
        (f"{SGLANG} {QWEN} --tp 8 --moe-runner-backend flashinfer_cutlass", (9, 0), "flashinfer_cutlass"),
        (f"{SGLANG} {QWEN} --tp 8 --enable-deterministic-inference", (9, 0), "Triton by its default configuration"),
        (f"{SGLANG} {QWEN} --tp 8 --moe-a2a-backend flashinfer", (9, 0), "FlashInfer's kernels"),
    ],
)
def test_other_kernels_read_none_and_there_is_a_remedy(line, capability, name):
    found = kernels(line, capability)
    assert (found.name, found.reads) == (name, "no")
    assert found.why.endswith(".")
    assert found.remedy.endswith(".")


@pytest.mark.parametrize(
    ("line", "capability"),
    [
        (f"{VLLM} {QWEN} -tp 8", None),
        (f"{SGLANG} {QWEN} --tp 8", None),
        (f"{SGLANG} {QWEN} --tp 8", (10, 0)),
        (f"{VLLM} {QWEN} -tp 8 --model x --quantization modelopt_fp8", (9, 0)),
    ],
)
def test_what_depends_on_more_is_unknown_and_a_flag_decides_it(line, capability):
    line = line.replace(f"{QWEN} -tp 8 --model x", f"{QWEN} -tp 8")
    found = kernels(line, capability)
    assert found.reads == "unknown"
    flag = "--moe-backend triton" if line.startswith(VLLM) else "--moe-runner-backend triton"
    assert flag in found.remedy
    assert kernels(f"{line} {flag}", capability).reads == "yes"


@pytest.mark.parametrize("selected", ["{} --moe-backend deep_gemm", "VLLM_USE_DEEP_GEMM=1 {}"])
def test_deep_gemm_reads_no_file_and_leaves_few_rows_to_triton_only_without_scales_that_are_powers_of_two(selected):
    line = selected.format(f"{VLLM} {R1} -dp 8 -ep")
    assert (kernels(line).reads, kernels(line).most_rows) == ("no", None)
    assert kernels(f"VLLM_USE_DEEP_GEMM_E8M0=1 {line}") == kernels(line)
    assert kernels(f"VLLM_USE_DEEP_GEMM_E8M0=0 {line}").most_rows == 127


def test_other_flags_and_variables_of_vllm_decide_what_reads_a_file():
    assert kernels(f"VLLM_USE_DEEP_GEMM=0 {VLLM} {R1} -dp 8 -ep").reads == "no"
    assert kernels(f"{VLLM} {R1} -dp 8 -ep --moe-backend cutlass").reads == "no"
    assert kernels(f"{VLLM} {R1} -dp 8 -ep --moe-backend cutlass", (10, 0)).most_rows == 8


def test_vllm_refines_blocks_that_128_does_not_divide():
    line = f"{VLLM} Qwen/Qwen3-30B-A3B-FP8 -tp 4"
    assert block_shape(read(line)) == (64, 64)
    assert kernels(line, (10, 0)).name == "Triton"
    assert block_shape(read(f"{SGLANG} Qwen/Qwen3-30B-A3B-FP8 --tp 4")) == (128, 128)
    assert block_shape(read(f"{VLLM} {R1} -tp 8")) == (128, 128)
    assert block_shape(read(f"{VLLM} {QWEN} -tp 8")) is None


@pytest.mark.parametrize(
    ("device", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA_H20", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA GB200", (10, 0)),
        ("NVIDIA B300 SXM6 AC", (10, 0)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)),
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA L40S", (8, 9)),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpus_capability_by_its_name(device, capability):
    assert capability_of(device) == capability
