"""Launches the grouped GEMM, with the builtin kernel or with another that has the same tunables."""

# mypy: allow-untyped-calls

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import triton

from moetune.backends.grouped_triton import activation, align, kernel, quantize
from moetune.backends.grouped_triton.kernel_versions import NEWEST, KernelVersion
from moetune.backends.grouped_triton.space import SCALE_BLOCK, Shapes, effective_block_size_k, swaps_operands

if TYPE_CHECKING:
    from moetune.backends.grouped_triton.align import Alignment


@dataclass(frozen=True, slots=True)
class Gemm:
    """Describes one GEMM without its tensors: `out[s] = a[s // slots_per_row] @ w[expert of s].T` for every slot s.

    `weighted`: each slot's result is multiplied by its router weight. `fp8`: e4m3 with block scales, else bf16.
    `zero_remote`: blocks of expert −1 write zeros. `version`: what vLLM's kernel does in the version that is measured.
    """

    N: int
    K: int
    slots_per_row: int
    weighted: bool
    num_local: int
    fp8: bool
    zero_remote: bool
    capability: tuple[int, int]
    version: KernelVersion = NEWEST


@dataclass(frozen=True, slots=True)
class Operands:
    """Holds the contiguous tensors of one GEMM. If nothing is launched, each is Triton's `MockTensor` of its dtype.

    `a` `[rows, K]`, `w` `[L, N, K]`, `out` `[slots, N]`, `slot_weights` f32 `[slots]`; in fp8 also `a_scales` f32
    `[rows, K/128]` and `w_scales` f32 `[L, N/128, K/128]`.
    """

    a: Any
    w: Any
    out: Any
    slot_weights: Any
    a_scales: Any = None
    w_scales: Any = None


def two_gemms(shapes: Shapes, zero_remote: bool, capability: tuple[int, int]) -> tuple[Gemm, Gemm]:
    """Returns the GEMM of gate and up, `[slots, 2·I]`, and that of down, `[slots, H]`, which is weighted."""
    hidden, intermediate = shapes.hidden_size, shapes.intermediate_size
    common: Any = {
        "num_local": shapes.num_local,
        "fp8": shapes.fp8,
        "zero_remote": zero_remote or not shapes.sorted,
        "capability": capability,
        "version": shapes.version,
    }
    return (
        Gemm(2 * intermediate, hidden, shapes.top_k, weighted=False, **common),
        Gemm(hidden, intermediate, 1, weighted=True, **common),
    )


class GroupedKernel(Protocol):
    """A Triton kernel that computes a `Gemm` and has the six tunables of `space.VALUES`."""

    name: str
    function: Any
    clamps_k: bool

    @property
    def digest(self) -> str:
        """A digest of the source of the kernel and of the kernels that run around it: 16 hex digits."""
        ...

    def arguments(
        self, gemm: Gemm, operands: Operands, alignment: Alignment, tactic: Mapping[str, object]
    ) -> dict[str, Any]:
        """Returns the launch's arguments by name, with the compiler's options `num_warps` and `num_stages`."""
        ...


class BuiltinKernel:
    """The kernel of this package."""

    name = "builtin"
    function = kernel.grouped_gemm_kernel
    clamps_k = True

    @property
    def digest(self) -> str:
        """See `GroupedKernel.digest`."""
        return source_digest(kernel.__file__)

    def arguments(
        self, gemm: Gemm, operands: Operands, alignment: Alignment, tactic: Mapping[str, object]
    ) -> dict[str, Any]:
        """See `GroupedKernel.arguments`."""
        return {
            **tactic,
            "a_ptr": operands.a,
            "w_ptr": operands.w,
            "out_ptr": operands.out,
            "a_scales_ptr": operands.a_scales,
            "w_scales_ptr": operands.w_scales,
            "slot_weights_ptr": operands.slot_weights,
            "sorted_slots_ptr": alignment.sorted_slots,
            "block_experts_ptr": alignment.block_experts,
            "num_padded_slots_ptr": alignment.num_padded_slots,
            "N": gemm.N,
            "K": gemm.K,
            "max_padded_slots": alignment.max_padded_slots,
            "num_slots": alignment.num_slots,
            "BLOCK_SIZE_K": effective_block_size_k(tactic, gemm.fp8),
            "SLOTS_PER_ROW": gemm.slots_per_row,
            "SCALE_BLOCK": SCALE_BLOCK if gemm.fp8 else 0,
            "WEIGHTED": gemm.weighted,
            "SORTED": alignment.sorted_slots is not None,
            "ZERO_REMOTE": gemm.zero_remote,
            "SWAP_AB": swaps_operands(tactic, gemm.fp8, gemm.capability, gemm.version),
        }


def launch(
    grouped: GroupedKernel, gemm: Gemm, operands: Operands, alignment: Alignment, tactic: Mapping[str, Any]
) -> None:
    """Runs the kernel on the current stream."""
    blocks_m = triton.cdiv(alignment.max_padded_slots, tactic["BLOCK_SIZE_M"])
    grid = (blocks_m * triton.cdiv(gemm.N, tactic["BLOCK_SIZE_N"]),)
    grouped.function[grid](**grouped.arguments(gemm, operands, alignment, tactic))


def source_digest(*paths: str) -> str:
    """Returns 16 hex digits of a digest over some files and over the kernels that run around the GEMMs."""
    digest = hashlib.sha256()
    for path in (*paths, align.__file__, quantize.__file__, activation.__file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]
