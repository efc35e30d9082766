"""Packs and unpacks weights of 4 bits, two in a byte with the even column in the low half, as checkpoints have them."""

from __future__ import annotations

import torch

MXFP4_GROUP = 32
"""The values along K that share an e8m0 scale (OCP MX, section 5.2)."""
INT4_GROUP = 128
"""The values along K that share a bf16 scale. FlashInfer's kernels have no other (`int4_group_size`)."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_EXPONENT = 2  # 6, the largest e2m1 value, is 1.5 · 2²
_E8M0_BIAS = 127
_INT4_LARGEST = 7


def to_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes f32 `[N, K]`: e2m1 codes uint8 `[N, K/2]` and e8m0 scales uint8 `[N, K/32]`.

    A scale is the power of two by which a group's largest value becomes 4 … 8 (OCP MX, section 6.3). A group of zeros
    takes the largest scale of the matrix, so that padding does not widen the range of an expert's scales.
    """
    groups = weights.reshape(len(weights), -1, MXFP4_GROUP)
    most = groups.abs().amax(-1)
    exponents = torch.where(most > 0, most, most.max()).log2().floor() - _E2M1_EXPONENT
    numbers = groups / exponents.exp2().unsqueeze(-1)
    steps = numbers.new_tensor(_E2M1)
    codes = torch.bucketize(numbers.abs(), (steps[1:] + steps[:-1]) / 2) + 8 * (numbers < 0)
    return _packed(codes.flatten(-2)), (exponents + _E8M0_BIAS).to(torch.uint8)


def from_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns what `to_mxfp4` quantized, rounded: f32 `[N, K]`."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    factors = (scales.float() - _E8M0_BIAS).exp2()
    return values[_unpacked(codes)] * factors.repeat_interleave(MXFP4_GROUP, -1)


def to_int4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes f32 `[N, K]`: int4 in two's complement, uint8 `[N, K/2]`, and bf16 scales `[N, K/128]`.

    A group's largest magnitude becomes 7.
    """
    groups = weights.reshape(len(weights), -1, INT4_GROUP)
    scales = (groups.abs().amax(-1) / _INT4_LARGEST).bfloat16()
    numbers = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, _INT4_LARGEST)
    return _packed(numbers.flatten(-2).to(torch.int64) & 15), scales


def from_int4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns what `to_int4` quantized, rounded: f32 `[N, K]`."""
    numbers = (_unpacked(codes) ^ 8) - 8  # the upper half of the codes is negative
    return numbers.float() * scales.float().repeat_interleave(INT4_GROUP, -1)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Returns the codes of `_packed` as int64, to index with."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
