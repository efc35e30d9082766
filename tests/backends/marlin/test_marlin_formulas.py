"""The engines' formulas for block_size_m, by examples and against the engines' own lines."""

import ast
import math
from pathlib import Path

import pytest

from moetune.backends.marlin.formulas import block_size_m

FILES = {
    "vllm": "vllm/model_executor/layers/fused_moe/experts/marlin_moe.py",
    "sglang": "sglang/srt/layers/moe/fused_moe_triton/fused_marlin_moe.py",
}
QUESTIONS = [
    (rows, top_k, num_experts // ep, num_experts)
    for rows in (1, 3, 16, 57, 128, 257, 1000, 4096, 65536)
    for top_k, num_experts in ((1, 384), (4, 128), (8, 384))
    for ep in (1, 4, 8, 16, 64)
    if num_experts % ep == 0
]


@pytest.mark.parametrize(
    ("rows", "vllm", "sglang"),
    # kimi-k2.5 on 8 ranks: 8·M/384 slots an expert; SGLang counts 8·M/48
    [(1, 8, 8), (64, 8, 16), (256, 8, 48), (512, 16, 64), (1024, 32, 64), (2048, 48, 64), (4096, 64, 64)],
)
def test_sglang_takes_blocks_that_are_too_large_by_the_number_of_ranks(rows, vllm, sglang):
    assert block_size_m("vllm", rows, 8, 48, 384) == vllm
    assert block_size_m("sglang", rows, 8, 48, 384) == sglang


def test_without_expert_parallelism_the_formulas_agree():
    for rows in range(1, 5000, 7):
        assert block_size_m("vllm", rows, 8, 384, 384) == block_size_m("sglang", rows, 8, 384, 384)


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_the_formula_is_that_of_vllm(vllm_version_sources, version):
    assert_same("vllm", vllm_version_sources(version))


def test_the_formula_is_that_of_sglang(engine_sources):
    assert_same("sglang", engine_sources("sglang"))


def assert_same(engine: str, sources: Path) -> None:
    """Executes the lines of the engine's function that set `block_size_m`, and the ones before that count rows."""
    tree = ast.parse((sources / FILES[engine]).read_text())
    (function,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "fused_marlin_moe"
    )
    lines = [node for node in function.body if _chooses(node)]
    assert len(lines) == (2 if engine == "vllm" else 1)
    code = compile(ast.Module(lines, []), engine, "exec")
    for rows, top_k, num_local, num_experts in QUESTIONS:
        names = {"M": rows, "topk": top_k, "E": num_local, "global_num_experts": num_experts, "math": math}
        exec(code, names)
        assert names["block_size_m"] == block_size_m(engine, rows, top_k, num_local, num_experts)


def _chooses(node: ast.stmt) -> bool:
    text = ast.unparse(node)
    counts = isinstance(node, ast.If) and "M * E / global_num_experts" in text
    return counts or (isinstance(node, ast.For) and "block_size_m" in text)
