import re

import pytest
from kernels_page import TUNED, page
from pages import text

from moetune.backends import registry
from moetune.inputs.dispatcher import dispatchers
from moetune.spec.enums import ENGINE_TITLES, Precision

PAGE = page()
RIVALS = {name for name in registry.backends() if registry.backend(name).rival}


def table(engine):
    """The rows of one engine, each a list of cells."""
    part = PAGE.partition(f"## {engine}\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()[2:]]


def test_the_file_is_what_the_function_writes():
    assert text("docs/kernels.md") == PAGE, "run: make pages"


@pytest.mark.parametrize("engine", ENGINE_TITLES)
def test_every_precision_has_one_row_for_every_dispatcher(engine):
    rows = table(ENGINE_TITLES[engine])
    for each in dispatchers():
        if each.engine != engine:
            continue
        found = [row[1] for row in rows if f"`{each.name}`" in row[0].split(", ")]
        if each.untunable:
            assert found == ["all"]
            continue
        precisions = [precision for cell in found for precision in cell.split(", ")]
        mxfp4 = ["mxfp4 (gpt-oss)", "mxfp4 (others)"]
        assert sorted(precisions) == sorted([*(p.value for p in Precision if p is not Precision.MXFP4), *mxfp4])


def test_every_backend_that_runs_on_hopper_tunes_something_for_an_engine():
    named = {
        backend
        for engine in ENGINE_TITLES.values()
        for row in table(engine)
        for backend in re.findall(r"`([\w-]+)`(?: \(|$|,)", f"{row[3]}, {row[4]}")
    }
    assert named == set(TUNED)
    on_blackwell = {"flashinfer-trtllm", "flashinfer-trtllm-routed"}
    assert set(TUNED) == set(registry.backends()) - on_blackwell - RIVALS - {"torch"}


def test_every_rival_is_timed_for_an_engine_whose_flag_selects_it():
    named = {
        rival
        for engine in ENGINE_TITLES.values()
        for row in table(engine)
        for rival in re.findall(r"`([\w-]+)` \(`", row[5])
    }
    assert named == RIVALS


@pytest.mark.parametrize(
    ("engine", "dispatcher", "precision", "kernels", "tuned"),
    [
        ("vLLM", "allgather_reducescatter", "bf16", "Triton", "`triton`"),
        ("vLLM", "deepep_low_latency", "bf16", "batched Triton", "`batched-triton`"),
        ("vLLM", "deepep_high_throughput", "fp8_block", "FlashInfer's CUTLASS kernel for fp8 blocks", "–"),
        ("vLLM", "flashinfer_nvlink_one_sided", "bf16", "FlashInfer's CUTLASS kernels", "`flashinfer-cutlass`"),
        (
            "vLLM",
            "nixl_ep",
            "mxint4",
            "batched Marlin; Humming if VLLM_HUMMING_MOE_GEMM_TYPE is grouped_masked",
            "–",
        ),
        ("vLLM", "deepep_high_throughput", "mxint4", "Humming; Marlin if Humming is not installed", "`humming`"),
        ("SGLang", "none", "fp8_block", "Triton", "`triton`"),
        ("SGLang", "none", "mxint4", "Marlin", "`marlin`"),
        ("SGLang", "none", "mxfp4 (others)", "FlashInfer's CUTLASS kernels", "`flashinfer-cutlass`"),
        ("vLLM", "flashinfer_all2allv", "mxfp4 (gpt-oss)", "FlashInfer's CUTLASS kernels", "`flashinfer-cutlass`"),
        ("TensorRT-LLM", "deepep", "bf16", "TensorRT-LLM's CUTLASS kernels", "–"),
    ],
)
def test_the_table_has_what_was_read(engine, dispatcher, precision, kernels, tuned):
    (row,) = [
        row for row in table(engine) if f"`{dispatcher}`" in row[0].split(", ") and precision in row[1].split(", ")
    ]
    assert row[2:4] == [kernels, tuned]
