"""`MarlinMatrices`: one GEMM's 4-bit weights of all experts, as Marlin reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from moetune.backends.marlin.formats import Format
from moetune.backends.marlin.packing import pack_codes, permute_scales, unpack_codes, unpermute_scales
from moetune.backends.prepared import E4M3_MAX

_E8M0_BIAS = 127
_E2M1_EXPONENT = 2  # 6, the largest e2m1 value, is 1.5 · 2²
_SHIFT = 2.0 ** (2**7 - 2**1 - 7)
"""What vLLM multiplies an nvfp4 tensor's scale with, because the kernel leaves exponents' biases out
(`nvfp4_marlin_process_global_scale`)."""
_S0E5M3 = 2.0**7
"""What vLLM multiplies an nvfp4 group's scale with before it becomes S0E5M3 (`nvfp4_marlin_process_scales`)."""


@dataclass(frozen=True, slots=True, eq=False)
class MarlinMatrices:
    """The weights `[N, K]` of each of L experts.

    Attributes:
        format: how they are stored.
        codes: int32 `[L, K/16, 2·N]`.
        scales: bf16, e8m0 or bytes of S0E5M3 as e4m3, `[L, K/group, N]`.
        expert_scales: f32 `[L]`, another factor of all scales of an expert, in nvfp4 only.
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    expert_scales: torch.Tensor | None = None

    @classmethod
    def empty(cls, fmt: Format, count: int, N: int, K: int, device: torch.device) -> Self:
        """Returns matrices without values, to be filled by `store`."""
        dtype = {"bf16": torch.bfloat16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}[fmt.scale]
        return cls(
            fmt,
            torch.empty(count, K // 16, 2 * N, dtype=torch.int32, device=device),
            torch.empty(count, K // fmt.group, N, dtype=dtype, device=device),
            torch.empty(count, dtype=torch.float32, device=device) if fmt.scale == "e4m3" else None,
        )

    def store(self, expert: int, weights: torch.Tensor) -> None:
        """Quantizes one expert's weights `[N, K]`, any dtype, and packs them. All-zero groups stay zero."""
        groups = weights.float().reshape(weights.shape[0], -1, self.format.group)
        scales, expert_scale = group_scales(self.format, groups)
        codes = nearest_codes(self.format, groups, scales * expert_scale)
        self.codes[expert] = pack_codes(codes.reshape(weights.shape).T)
        self.scales[expert] = _stored(self.format, scales.T)
        if self.expert_scales is not None:
            self.expert_scales[expert] = expert_scale * _SHIFT

    def fp32(self, expert: int) -> torch.Tensor:
        """Returns one expert's weights in fp32, from what the kernel reads: `[N, K]`."""
        values = torch.tensor(self.format.values, device=self.codes.device)
        scales = _loaded(self.format, self.scales[expert])
        if self.expert_scales is not None:
            scales = scales * (self.expert_scales[expert] / _SHIFT)
        numbers = values[unpack_codes(self.codes[expert]).long()]
        return (numbers * scales.repeat_interleave(self.format.group, 0)).T


def group_scales(fmt: Format, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Returns the scale of each group, f32 `[N, K/group]`, that its format holds exactly, and the expert's own scale.

    int4: the largest magnitude becomes 7. mxfp4: a power of two, so that it becomes 4 … 8 (OCP MX, section 6.3).
    nvfp4: it becomes 6, and the largest scale of an expert is e4m3's limit.
    """
    most = groups.abs().amax(-1)
    if fmt.scale == "bf16":
        return (most / max(fmt.values)).bfloat16().float(), 1.0
    if fmt.scale == "e8m0":
        exponents = most.log2().floor().sub(_E2M1_EXPONENT).clamp(1 - _E8M0_BIAS, _E8M0_BIAS)
        return exponents.exp2(), 1.0
    wanted = most / max(fmt.values)
    expert_scale = wanted.max() / E4M3_MAX
    scales = torch.where(wanted > 0, wanted / expert_scale, 0.0)
    return scales.to(torch.float8_e4m3fn).float(), expert_scale


def nearest_codes(fmt: Format, groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the codes of the nearest values: uint8 `[N, K/group, group]`."""
    numbers = torch.where(scales.unsqueeze(-1) > 0, groups / scales.unsqueeze(-1), 0.0)
    if fmt.scale == "bf16":
        return (numbers.round().clamp(-8, 7) + fmt.zero).to(torch.uint8)
    steps = numbers.new_tensor(fmt.values[:8])
    magnitudes = torch.bucketize(numbers.abs(), (steps[1:] + steps[:-1]) / 2)
    return (magnitudes + 8 * (numbers < 0)).to(torch.uint8)


def _stored(fmt: Format, scales: torch.Tensor) -> torch.Tensor:
    """Returns scales `[K/group, N]` in the kernel's order and format."""
    if fmt.scale == "bf16":
        return permute_scales(scales.bfloat16())
    permuted = permute_scales(scales, interleaved=True)
    if fmt.scale == "e8m0":
        return permuted.to(torch.float8_e8m0fnu)
    halves = (permuted * _S0E5M3).half()  # positive, so the sign's bit is free for the exponent
    bits = torch.where(halves < 2, 0, halves.view(torch.int16) << 1)
    return bits.contiguous().view(torch.uint8)[:, 1::2].contiguous().view(torch.float8_e4m3fn)


def _loaded(fmt: Format, stored: torch.Tensor) -> torch.Tensor:
    """Returns the scales of `_stored` in fp32: `[K/group, N]`."""
    if fmt.scale == "bf16":
        return unpermute_scales(stored).float()
    if fmt.scale == "e8m0":
        return unpermute_scales(stored.float(), interleaved=True)
    halves = (stored.view(torch.uint8).to(torch.int16) << 7).view(torch.float16)
    return unpermute_scales(halves.float() / _S0E5M3, interleaved=True)
