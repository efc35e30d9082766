import pytest

from moetune.backends import registry
from moetune.errors import UnsupportedError
from moetune.inputs import launch
from moetune.inputs.engine_flags import ENGINES, engine_flags, preferred_to_triton, reaches
from moetune.spec.enums import Precision

LINES = {"vllm": "vllm serve Qwen/Qwen3-235B-A22B {}", "sglang": "sglang serve --model-path Qwen/Qwen3-235B-A22B {}"}
SERVED = [name for name in registry.backends() if name != "torch"]
ROWS = [
    name
    for name in SERVED
    if name not in ("batched-triton", "triton-kernels", "humming") and not registry.backend(name).rival
]


@pytest.mark.parametrize("backend", ROWS)
@pytest.mark.parametrize("engine", LINES)
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8_BLOCK, Precision.NVFP4])
def test_the_reader_of_launch_lines_takes_each_flag_for_its_backend(backend, engine, precision):
    read = launch.read(LINES[engine].format(engine_flags(backend, precision)[engine])).options["backend"]
    routed_by_itself = engine == "vllm" and backend == "flashinfer-trtllm-routed"  # one word for both ops
    assert read == ("flashinfer-trtllm" if routed_by_itself else backend)


def test_for_mxfp4_experts_the_flag_of_the_grouped_kernel_means_triton_kernels():
    flags = engine_flags("triton-kernels", Precision.MXFP4)
    assert flags == {"vllm": "--moe-backend triton"}
    for model, backend in (("openai/gpt-oss-120b", "triton-kernels"), ("Qwen/Qwen3-235B-A22B", "triton")):
        assert launch.read(f"vllm serve {model} {flags['vllm']}").options["backend"] == backend


def test_humming_is_tuned_for_vllm_and_sglangs_older_one_is_refused():
    flags = engine_flags("humming", Precision.MXINT4)
    assert flags == {"vllm": "--moe-backend humming"}
    assert launch.read(LINES["vllm"].format(flags["vllm"])).options["backend"] == "humming"
    with pytest.raises(UnsupportedError, match="--moe-runner-backend humming selects MoE kernels that"):
        launch.read(LINES["sglang"].format("--moe-runner-backend humming"))


def test_the_flag_of_the_batched_kernel_is_that_of_the_grouped_one_with_another_dispatcher():
    flags = engine_flags("batched-triton", Precision.BF16)
    assert flags == {"vllm": "--moe-backend triton"}
    line = f"{LINES['vllm'].format(flags['vllm'])} -dp 8 -ep --all2all-backend nixl_ep"
    assert launch.read(line).options["backend"] == "batched-triton"


@pytest.mark.parametrize("layout", [None, "packed", "deduplicated", "slot", "pool", "batched"])
def test_expert_major_rows_reach_the_batched_kernel_alone(layout):
    assert reaches("batched-triton", layout) == (layout == "batched")
    assert reaches("triton", layout) == (layout not in ("pool", "batched"))
    assert reaches("flashinfer-cutlass", layout) == (layout != "batched")


@pytest.mark.parametrize("capability", [9, 10])
def test_on_expert_major_rows_only_fp8_blocks_have_other_kernels(capability):
    assert preferred_to_triton("vllm", Precision.BF16, 8, capability, "batched") is None
    assert preferred_to_triton("vllm", Precision.FP8_BLOCK, 8, capability, "batched") == "DeepGEMM's masked kernels"


def test_sglang_has_a_word_of_its_own_for_mxfp4():
    flags = engine_flags("flashinfer-trtllm", Precision.MXFP4)
    assert flags["sglang"] == "--moe-runner-backend flashinfer_mxfp4"
    assert launch.read(LINES["sglang"].format(flags["sglang"])).options["backend"] == "flashinfer-trtllm"


def test_on_hopper_that_word_selects_cutlass_kernels_which_take_no_pools():
    flags = {"vllm": "--moe-backend flashinfer_cutlass", "sglang": "--moe-runner-backend flashinfer_mxfp4"}
    assert engine_flags("flashinfer-cutlass", Precision.MXFP4) == flags
    assert engine_flags("flashinfer-cutlass", Precision.MXFP4, "deduplicated") == flags
    assert engine_flags("flashinfer-cutlass", Precision.MXFP4, "pool") == {"vllm": flags["vllm"]}
    assert "sglang" in engine_flags("flashinfer-cutlass", Precision.BF16, "pool")


def test_no_flag_of_an_engine_selects_flashinfers_kernels_for_w4a8():
    assert engine_flags("flashinfer-cutlass", Precision.W4A8) == {}


@pytest.mark.parametrize(
    "settings",
    [
        "moe_config: {backend: TRTLLM}",  # as docs/engines.md prints it
        "moe_config:\n  backend: TRTLLM\n",
        "moe-config:\n    'backend': \"TRTLLM\"  # Blackwell\n",
        '{"moe_config": {"backend": "TRTLLM"}}',
    ],
)
def test_tensorrt_llm_reads_its_flag_in_every_form_of_yaml(settings, tmp_path):
    assert engine_flags("flashinfer-trtllm", Precision.NVFP4)["trtllm"] == "moe_config.backend: TRTLLM"
    (tmp_path / "settings.yaml").write_text(settings)
    line = f"trtllm-serve Qwen/Qwen3-235B-A22B --config {tmp_path / 'settings.yaml'}"
    assert launch.read(line).options["backend"] == "flashinfer-trtllm"


def test_no_engine_runs_plain_torch_and_every_other_backend_has_an_engine():
    assert engine_flags("torch", Precision.BF16) == {}
    assert all(set(engine_flags(backend, Precision.BF16)) <= set(ENGINES) for backend in SERVED)
    assert all(engine_flags(backend, Precision.BF16) for backend in SERVED)
