"""Quantizes rows to NVFP4 in plain torch: packed e2m1 values, and one e4m3 scale for each 16 of them."""

from __future__ import annotations

import torch

BLOCK = 16
"""The values that share a scale."""
_LARGEST = 6.0
_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""The middles between the numbers that e2m1 has: 0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP Microscaling Formats 1.0, table 6)."""
_LEAST_SCALE = 2.0**-9
"""The smallest e4m3 number above zero."""


def quantize(x: torch.Tensor) -> torch.Tensor:
    """Returns rows that hold the packed values and then their scales: uint8 `[M, H/2 + H/16]`.

    A scale is the largest magnitude of its block over 6, rounded to e4m3. A byte has the value with the even index in
    its lower half.

    Args:
        x: `[M, H]`, any float dtype; H is a multiple of 16.
    """
    rows, hidden = x.shape
    blocks = x.float().view(rows, hidden // BLOCK, BLOCK)
    magnitude = blocks.abs()
    # no division: 1 % of bf16 values lie in the middle of two numbers, and a compiled division is off in its last bits
    scales = (magnitude.amax(2) * (1 / _LARGEST)).clamp(min=_LEAST_SCALE).to(torch.float8_e4m3fn)
    scale = scales.float().unsqueeze(2)
    codes = (blocks < 0).int() << 3
    for middle in _BETWEEN:  # no table: a CUDA graph cannot capture its copy to the device
        codes = codes + (magnitude > middle * scale)
    codes = codes.view(rows, hidden // 2, 2)
    packed = (codes[:, :, 0] | (codes[:, :, 1] << 4)).to(torch.uint8)
    return torch.cat((packed, scales.view(torch.uint8)), dim=1)


def dequantize(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values of `quantize`'s result `[M, H/2 + H/16]`, as `[M, H]` of `dtype`."""
    hidden = rows.shape[1] * BLOCK // (BLOCK // 2 + 1)
    packed = rows[:, : hidden // 2].int()
    codes = torch.stack((packed & 15, packed >> 4), dim=2)
    fraction, exponent = (codes & 1).float(), (codes >> 1) & 3
    magnitude = torch.where(exponent == 0, 0.5 * fraction, (2.0 + fraction) * (1 << exponent) / 4.0)
    values = torch.where(codes >= 8, -magnitude, magnitude)
    scales = rows[:, hidden // 2 :].contiguous().view(torch.float8_e4m3fn).float()
    return (values.view(len(rows), -1, BLOCK) * scales.unsqueeze(2)).view(len(rows), hidden).to(dtype)
