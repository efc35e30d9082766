"""Packs top-k ids and weights into one int32 per slot, the input format of the routed TensorRT-LLM MoE ops.

The format is `(id << 16) | bits of the bf16 weight` (vLLM #37695). The bits are masked to 16, because otherwise the
sign of a negative weight would overwrite the id.
"""

from __future__ import annotations

import torch

from moetune.errors import UsageError
from moetune.workload.fused import Fused

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)
_BF16_NAN = 0x7FC0


def pack_eager(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Packs as `pack_topk` does, without compilation and checks, for tensors of any shape."""
    bits = weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    if weights.dtype != torch.bfloat16:
        bits = torch.where(weights.isnan(), _BF16_NAN, bits)
    return (ids.to(torch.int32) << 16) | bits


_fused = Fused(pack_eager)


def pack_topk(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Packs ids and weights into one int32 each, with one fused kernel.

    Args:
        ids: int32 or int64 `[M, k]`, −32768 … 32767 (not checked); −1 stands for no expert.
        weights: bf16, f16 or f32 `[M, k]` on the same device. A NaN of f16 or f32 becomes 0x7fc0. A NaN of bf16 keeps
            its bits.

    Returns:
        int32 `[M, k]`.

    Raises:
        UsageError: shapes or devices differ, or a dtype is not one of these.
    """
    if ids.shape != weights.shape or ids.device != weights.device:
        raise UsageError(
            f"ids and weights must have one shape and device, given {tuple(ids.shape)} on {ids.device} "
            f"and {tuple(weights.shape)} on {weights.device}."
        )
    if ids.dtype not in ID_DTYPES or weights.dtype not in WEIGHT_DTYPES:
        raise UsageError(
            "ids must be int32 or int64 and weights bfloat16, float16 or float32, "
            f"given {ids.dtype} and {weights.dtype}."
        )
    pack = pack_eager if ids.numel() < 2 else _fused  # sizes 0 and 1 would be compiled apart
    return pack(ids.reshape(-1), weights.reshape(-1)).view(ids.shape)


def compile_failure() -> Exception | None:
    """Returns the error because of which `pack_topk` runs eagerly, or None."""
    return _fused.failure


def unpack_topk(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpacks the result of `pack_topk`: returns `(ids int32, weights bf16)`, both of `packed`'s shape.

    Raises:
        UsageError: `packed` is not int32.
    """
    if packed.dtype != torch.int32:
        raise UsageError(f"A packed top-k is int32, given {packed.dtype}.")
    return packed >> 16, (packed & 0xFFFF).to(torch.int16).view(torch.bfloat16)
