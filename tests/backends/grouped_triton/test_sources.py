"""Where an engine's kernel comes from, and what is said where it cannot."""

import pytest

from moetune.backends.grouped_triton.align import Alignment
from moetune.backends.grouped_triton.gemm import Operands, two_gemms
from moetune.backends.grouped_triton.sources import EngineKernel, grouped_kernel
from moetune.backends.grouped_triton.space import VALUES, Shapes
from moetune.errors import UnsupportedError, UsageError
from moetune.spec.tactic import Tactic

KERNEL = "import triton\nimport triton.language as tl\n\n@triton.jit\ndef fused_moe_kernel(a_ptr, N, {}):\n    pass\n"


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="builtin, vllm, sglang"):
        grouped_kernel("cutlass")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_is_not_installed_is_named(engine, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=f"{engine}, which is not installed. pip install {engine}"):
        grouped_kernel(engine)


def test_an_engine_without_the_file_names_the_places(tmp_path, monkeypatch):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedError, match=r"moe_runner.*fused_moe_triton"):
        grouped_kernel("sglang")


@pytest.mark.parametrize(
    ("engine", "place"),
    [
        ("vllm", "model_executor/layers/fused_moe/fused_moe.py"),
        ("sglang", "kernels/ops/moe/fused_moe_triton_kernels.py"),  # 0.5.23
        ("sglang", "srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_kernels.py"),
        ("sglang", "srt/layers/moe/fused_moe_triton/fused_moe_triton_kernels.py"),
    ],
)
def test_the_file_is_found_where_each_version_has_it(engine, place, tmp_path, monkeypatch):
    path = tmp_path / engine / place
    path.parent.mkdir(parents=True)
    path.write_text(KERNEL.format("K, SWAP_AB: tl.constexpr, MASK_OUTPUT: tl.constexpr"))
    (tmp_path / engine / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert grouped_kernel(engine).name == engine


@pytest.mark.parametrize("name", ["swap_ab", "SWAP_AB"])
def test_operands_are_swapped_under_either_spelling(name, tmp_path):
    path = tmp_path / "fused_moe.py"
    path.write_text(KERNEL.format(f"K, {name}: tl.constexpr"))
    shapes, alignment = Shapes(16, 8, 256, 256, 4, 32, fp8=True), Alignment(None, None, None, 256, 128)
    for block_m, swapped in ((16, True), (64, False)):
        tactic = Tactic(dict(zip(VALUES, (block_m, 64, 128, 1, 4, 3), strict=True)))
        gemm = two_gemms(shapes, False, (9, 0))[0]
        arguments = EngineKernel("vllm", path).arguments(gemm, Operands(*[None] * 4), alignment, tactic)
        assert arguments[name] is swapped


def test_an_argument_that_is_not_known_is_named(tmp_path):
    path = tmp_path / "fused_moe.py"
    path.write_text(KERNEL.format("SPLIT_J: tl.constexpr, K"))
    with pytest.raises(UnsupportedError, match="does not know: SPLIT_J"):
        EngineKernel("vllm", path)


def test_an_argument_that_has_a_default_keeps_it(tmp_path):
    path = tmp_path / "fused_moe.py"
    path.write_text(KERNEL.format("K, SPLIT_J: tl.constexpr = 1"))
    assert EngineKernel("vllm", path).name == "vllm"


def test_a_file_without_the_kernel_is_refused(tmp_path):
    path = tmp_path / "fused_moe.py"
    path.write_text("def fused_moe_kernel():\n    pass\n")
    with pytest.raises(UnsupportedError, match="defines no fused_moe_kernel"):
        EngineKernel("vllm", path)


def test_the_digest_follows_the_source(tmp_path):
    digests = set()
    for index, parameters in enumerate(("K", "K, EM")):
        path = tmp_path / f"{index}.py"
        path.write_text(KERNEL.format(parameters))
        digests.add(EngineKernel("vllm", path).digest)
    assert len(digests) == 2
