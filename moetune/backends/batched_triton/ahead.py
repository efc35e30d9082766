"""Compiles tactics without a launch and without a GPU, so that other processes can do it before the tactics run."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from triton.runtime.jit import MockTensor

from moetune.backends.batched_triton.gemm import Operands, batched_kernel, two_gemms
from moetune.backends.batched_triton.space import Shapes
from moetune.backends.grouped_triton.ahead import headless


def compile_gemm(shapes: Shapes, tactic: Mapping[str, Any], part: int, capability: tuple[int, int], kernel: str) -> Any:
    """Compiles one GEMM of a tactic into Triton's cache, under the key of the launches to come.

    Args:
        shapes: the deployment's shapes.
        tactic: one of `space.candidates`.
        part: the number of the GEMM, 0 or 1.
        capability: the device's compute capability, such as (9, 0).
        kernel: the kernel's name.

    Raises:
        Exception: whatever Triton or ptxas raises for a tactic that does not compile.
    """
    f32, i32, bf16 = MockTensor(torch.float32), MockTensor(torch.int32), MockTensor(torch.bfloat16)
    value, scales = (MockTensor(torch.float8_e4m3fn), f32) if shapes.fp8 else (bf16, None)
    batched, operands = batched_kernel(kernel), Operands(value, value, bf16, i32, scales, scales)
    with headless(capability):
        arguments = batched.arguments(two_gemms(shapes)[part], operands, tactic)
        return batched.function.warmup(grid=(1,), **arguments)
