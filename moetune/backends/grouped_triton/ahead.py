"""Compiles tactics without a launch and without a GPU, so that other processes can do it before the tactics run."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from moetune.backends.grouped_triton.align import Alignment
from moetune.backends.grouped_triton.gemm import Gemm, GroupedKernel, Operands, two_gemms
from moetune.backends.grouped_triton.sources import grouped_kernel
from moetune.backends.grouped_triton.space import Shapes, max_padded_slots


def compile_gemms(
    shapes: Shapes,
    tactic: Mapping[str, Any],
    which: Sequence[int] = (0, 1),
    *,
    capability: tuple[int, int],
    kernel: str = "builtin",
    zero_remote: bool = False,
) -> list[Any]:
    """Compiles GEMMs of one tactic into Triton's cache, under the keys of the launches to come.

    Needs no GPU and no CUDA context. The builtin kernel's keys are the same for all buckets of a layer.

    Args:
        shapes: the bucket's shapes.
        tactic: one of `space.candidates`.
        which: the numbers of the GEMMs to compile: 0, 1 or both.
        capability: the device's compute capability, such as (9, 0).
        kernel: the grouped GEMM's name; see `sources`.
        zero_remote: whether blocks of non-local slots write zeros, as in the launch.

    Raises:
        Exception: whatever Triton or ptxas raises for a tactic that does not compile.
    """
    grouped, gemms = grouped_kernel(kernel), two_gemms(shapes, zero_remote, capability)
    with headless(capability):
        return [_compile(grouped, gemms[number], shapes, tactic, zero_remote) for number in which]


def _compile(grouped: GroupedKernel, gemm: Gemm, shapes: Shapes, tactic: Mapping[str, Any], zero_remote: bool) -> Any:
    f32, i32, bf16 = MockTensor(torch.float32), MockTensor(torch.int32), MockTensor(torch.bfloat16)
    value = MockTensor(torch.float8_e4m3fn) if gemm.fp8 else bf16
    scales = f32 if gemm.fp8 else None
    groups = shapes.num_groups(zero_remote)
    block_m = tactic["BLOCK_SIZE_M"]
    padded = max_padded_slots(shapes.num_slots, groups, block_m) if shapes.sorted else shapes.num_slots * block_m
    alignment = Alignment(i32 if shapes.sorted else None, i32, i32, padded, shapes.num_slots)
    operands = Operands(value, value, bf16, f32, scales, scales)
    return grouped.function.warmup(grid=(1,), **grouped.arguments(gemm, operands, alignment, tactic))


class _HeadlessDriver:
    """Gives Triton's compiler what it needs of a driver, for a device that need not be present."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        """Returns no number of a real device, because Triton keeps compiled kernels by it."""
        return "headless"

    def get_current_stream(self, device: object = None) -> int:
        return 0


@contextmanager
def headless(capability: tuple[int, int]) -> Iterator[None]:
    """Lets Triton compile for a device of this compute capability, which need not be present."""
    config = triton.runtime.driver
    previous = config._active
    config.set_active(_HeadlessDriver(capability))
    try:
        yield
    finally:
        config.set_active(previous)
