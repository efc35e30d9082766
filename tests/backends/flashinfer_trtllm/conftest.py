"""FlashInfer's own Python over a module that stands for its compiled one; see `trtllm_compiled`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from trtllm_compiled import CompiledModule


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: on a busy machine waking torch's threads takes many times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> CompiledModule:
    from flashinfer import fp4_quantization
    from flashinfer.fused_moe import core
    from flashinfer.fused_moe.backends.trtllm import MoERunner
    from flashinfer.quantization import fp4_quantization as fp4
    from flashinfer.quantization import fp8_quantization as fp8
    from trtllm_compiled import CompiledModule, interleave, quantize_fp4, quantize_mxfp8

    module = CompiledModule()

    class Specification:
        def build_and_load(self) -> CompiledModule:
            return module

        def get_library_paths(self) -> list[str]:
            return []

    monkeypatch.setattr(core, "gen_trtllm_gen_fused_moe_sm100_module", lambda enable_rubin: Specification())
    ops = core._get_trtllm_moe_sm100_module_impl.__wrapped__(False)
    monkeypatch.setattr(core, "get_trtllm_moe_sm100_module", lambda: ops)
    monkeypatch.setattr(fp4_quantization, "fp4_quantize", quantize_fp4)
    monkeypatch.setattr(fp4, "block_scale_interleave", interleave)
    monkeypatch.setattr(fp8, "mxfp8_quantize", quantize_mxfp8)
    monkeypatch.setattr(MoERunner, "valid_tactics_dict", {})
    return module
