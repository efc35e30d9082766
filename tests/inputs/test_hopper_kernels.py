"""The kernels on Hopper: the look-up of tuned files and the plan say the same as the table of docs/kernels.md."""

import pytest

from moetune.backends.registry import backends
from moetune.inputs.engine_flags import TRITON, engine_flags, preferred_to_triton, reaches
from moetune.inputs.engine_kernels import chosen
from moetune.inputs.hopper_kernels import on_hopper
from moetune.inputs.launch_table import read
from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

VLLM, SGLANG = "vllm serve", "python -m sglang.launch_server --model-path"
MODELS = {"bf16": "Qwen/Qwen3-235B-A22B", "fp8_block": "deepseek-ai/DeepSeek-R1", "mxfp4": "openai/gpt-oss-120b"}
SHARED = (
    "-tp 8", "-tp 8 -ep", "-dp 8 -ep", "-dp 8 -ep --all2all-backend deepep_high_throughput",
    "-dp 8 -ep --all2all-backend deepep_low_latency", "-dp 8 -ep --all2all-backend nixl_ep",
    "-dp 8 -ep --all2all-backend flashinfer_nvlink_one_sided",
)  # fmt: skip
LINES = [
    *(f"{VLLM} {model} {flags}" for model in MODELS.values() for flags in SHARED),
    *(f"{SGLANG} {model} --tp 8 {flags}" for model in MODELS.values() for flags in ("", "--ep 8")),
]
REGIMES = [
    Regime(), Regime(tp_size=8), Regime(ep_size=8), Regime(ep_size=8, dispatch="allgather"),
    Regime(ep_size=8, layout="deduplicated"), Regime(ep_size=8, layout="pool"), Regime(ep_size=8, layout="batched"),
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_look_up_finds_a_file_where_the_table_names_a_kernel_that_reads_one(line):
    asked = read(line)
    assert asked.regime is not None
    kernel = on_hopper(asked.engine, asked.layer, asked.regime)
    assert kernel is not None
    found = chosen(asked, (9, 0))
    assert (found.reads == "yes") == (kernel.backend in TRITON), (found, kernel)
    if found.reads == "yes" or asked.layer.precision is Precision.MXFP4:
        assert found.name in (kernel.name, "FlashInfer's kernels")


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.slug)
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8_BLOCK])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_plan_names_other_kernels_where_the_table_does(engine, precision, regime):
    backend = "batched-triton" if regime.layout == "batched" else "triton"
    if not reaches(backend, regime.layout) or engine not in engine_flags(backend, precision):
        return
    kernel = on_hopper(engine, preset("qwen3-235b-a22b").model_copy(update={"precision": precision}), regime)
    assert kernel is not None
    other = preferred_to_triton(engine, precision, regime.ep_size, 9, regime.layout)
    assert (other is None) == (kernel.backend == backend), (other, kernel)


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.slug)
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_every_backend_of_the_table_is_one_that_the_engine_can_run(engine, precision, regime):
    kernel = on_hopper(engine, MoELayer(**SIZES, precision=precision), regime)
    if kernel is not None and kernel.backend is not None:
        assert kernel.backend in backends()
        assert engine in engine_flags(kernel.backend, precision)
        assert reaches(kernel.backend, regime.layout)


SIZES = {"num_experts": 64, "top_k": 8, "hidden_size": 4096, "intermediate_size": 2048}


def test_gpt_oss_has_kernels_of_its_own():
    gpt_oss = MoELayer(**SIZES, precision="mxfp4", activation=Activation.SWIGLU_CLAMPED)
    other = MoELayer(**SIZES, precision="mxfp4")
    for engine, ep in (("vllm", 8), ("sglang", 1)):
        names = {on_hopper(engine, layer, Regime(ep_size=ep)).name for layer in (gpt_oss, other)}
        assert "OpenAI's triton_kernels" in names
        assert len(names) == 2


def test_what_was_not_looked_at_has_no_answer():
    assert on_hopper("vllm", MoELayer(**SIZES, precision="bnb_4bit"), Regime()) is None
