"""Where an engine's kernel comes from, and what is said where it cannot."""

import pytest

from moetune.backends.grouped_triton.sources import EngineKernel, grouped_kernel
from moetune.errors import UnsupportedError, UsageError

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
