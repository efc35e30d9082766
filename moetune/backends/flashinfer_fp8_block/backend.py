"""Defines `FlashInferFp8BlockBackend`: FlashInfer's `cutlass_fused_moe` with DeepSeek's fp8 blocks.

vLLM prefers it for fp8 blocks on Hopper where ranks share the experts (`fused_moe/oracle/fp8.py`). With
`use_deepseek_fp8_block_scale` the op ignores `profile_ids`; its runner sets one configuration itself
(`setRunnerProfiles` in `flashinfer_cutlass_fused_moe_binding.cu`, 0.7.2.post1).
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.op import lacking, version
from moetune.backends.grouped_triton import support
from moetune.backends.prepared import WeightCache
from moetune.backends.rival import Rival
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

if TYPE_CHECKING:
    from moetune.backends.flashinfer_fp8_block.runner import BlockRunner
    from moetune.backends.grouped_triton.weights import TritonExperts

CAPABILITIES = ((9, 0),)
"""The op refuses fp8 blocks elsewhere (`cutlass_fused_moe` in `fused_moe/core.py`)."""


class FlashInferFp8BlockBackend(Rival):
    """Times FlashInfer's kernels for e4m3 weights in blocks of 128×128, on compute capability 9.0.

    The op reads bf16 rows. It sorts them, quantizes them in groups of 128, and likewise the activation, and it adds the
    slots of a row, all in one call, so the time has all of this.
    """

    name = "flashinfer-fp8-block"
    modules = ("moetune.backends.flashinfer_fp8_block.runner",)

    def __init__(self) -> None:
        super().__init__()
        self._weights: WeightCache[TritonExperts] = WeightCache()

    def unavailable(self) -> tuple[str, str] | None:
        """Returns a reason and a hint if FlashInfer, a Hopper GPU, the op's module or a compiler is missing."""
        obstacle = lacking("use_deepseek_fp8_block_scale", "the argument for fp8 blocks", CAPABILITIES)
        if obstacle or not compiles() or shutil.which(compiler()):
            return obstacle
        return (
            f"FlashInfer compiles these kernels when they first run, and {compiler()} is missing",
            "Put nvcc on the PATH, or set TRTLLM_DG_NVCC_COMPILER to its path.",
        )

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why the layer is not computed: its rows, precision, activation, biases, sizes or shards."""
        if reason := self.other_rows(regime):
            return reason
        if layer.precision is not Precision.FP8_BLOCK:
            return f"computes fp8_block experts, not {layer.precision.value}"
        if reason := support.unsupported(layer, regime):
            return reason
        if (layer.num_experts + regime.redundant_experts) % regime.ep_size:
            return "the op computes a rank's first expert as rank · L, so all shards must be equal"
        return None

    def environment(self) -> dict[str, str]:
        """Returns FlashInfer's version, and whether it runs DeepGEMM's kernels or those that it was built with."""
        return {"flashinfer": version(), "block_kernels": "deep_gemm" if compiles() else "cutlass"}

    def tolerance(self, layer: MoELayer) -> float:
        """Returns that of the Triton kernel, because both round inputs and intermediate to e4m3 in groups of 128."""
        return support.TOLERANCES[Precision.FP8_BLOCK]

    def prepared(self, problem: Problem) -> BlockRunner:
        """See `Rival.prepared`. Weights are kept for the next bucket."""
        from moetune.backends.flashinfer_fp8_block.runner import BlockRunner
        from moetune.backends.grouped_triton.weights import random_experts

        return BlockRunner(problem, self._weights.get(problem, lambda: random_experts(problem)))


def compiles() -> bool:
    """Returns whether FlashInfer compiles DeepGEMM's kernels at run time (`getDeepGemmEnabled`), as it does by default.

    Otherwise it runs a CUTLASS kernel that it was built with.
    """
    return os.environ.get("TRTLLM_DG_ENABLED") != "0"


def compiler() -> str:
    """Returns the nvcc that it calls for that (`getNvccCompiler` in `tensorrt_llm/deep_gemm/compiler.cuh`)."""
    if named := os.environ.get("TRTLLM_DG_NVCC_COMPILER"):
        return named
    home = os.environ.get("CUDA_HOME")
    return os.path.join(home, "bin", "nvcc") if home else "nvcc"
