"""The random experts of the Humming backend, as checkpoints that Humming reads store them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetune.backends.base import Problem
from moetune.backends.humming.gemm import Gemm, gemms
from moetune.backends.marlin.formats import Format
from moetune.backends.marlin.matrices import group_scales, nearest_codes

_BIAS_DEVIATION = 0.1
SCALE_DTYPES = {"bf16": torch.bfloat16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True, eq=False)
class StoredMatrices:
    """One GEMM's weights `[N, K]` of each of L experts, without padding.

    Attributes:
        format: how they are stored.
        codes: int32 `[L, N, K/8]`, eight codes in a word, the first in the lowest bits.
        scales: bf16, e8m0 or e4m3 `[L, N, K/group]`.
        expert_scales: f32 `[L]`, another factor of all scales of an expert, in nvfp4 only.
        bias: bf16 `[L, N]`, or None.
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    expert_scales: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def random(cls, gemm: Gemm, halves: int, generator: torch.Generator) -> StoredMatrices:
        """Draws normal weights of variance 1/K and quantizes them; `halves` are drawn one after the other."""
        fmt, count, N, K, device = gemm.format, gemm.num_experts, gemm.columns, gemm.depth, generator.device
        stored = cls(
            fmt,
            torch.empty(count, N, K // 8, dtype=torch.int32, device=device),
            torch.empty(count, N, K // fmt.group, dtype=SCALE_DTYPES[fmt.scale], device=device),
            torch.empty(count, dtype=torch.float32, device=device) if fmt.scale == "e4m3" else None,
            torch.empty(count, N, dtype=torch.bfloat16, device=device) if gemm.bias else None,
        )
        for expert in range(count):
            drawn = torch.randn(halves, N // halves, K, generator=generator, device=device).mul_(K**-0.5)
            groups = drawn.view(N, -1, fmt.group)
            scales, expert_scale = group_scales(fmt, groups)
            low, high = nearest_codes(fmt, groups, scales * expert_scale).view(N, -1, 2).unbind(2)
            stored.codes[expert] = (low | high << 4).contiguous().view(torch.int32)
            stored.scales[expert] = scales.to(stored.scales.dtype)
            if stored.expert_scales is not None:
                stored.expert_scales[expert] = expert_scale
            if stored.bias is not None:
                stored.bias[expert] = torch.randn(N, generator=generator, device=device).mul_(_BIAS_DEVIATION)
        return stored

    def fp32(self, expert: int) -> torch.Tensor:
        """Returns one expert's weights in fp32: `[N, K]`."""
        values = torch.tensor(self.format.values, device=self.codes.device)
        pairs = self.codes[expert].contiguous().view(torch.uint8)
        codes = torch.stack((pairs & 15, pairs >> 4), -1).view(len(pairs), -1)
        scales = self.scales[expert].float()
        if self.expert_scales is not None:
            scales = scales * self.expert_scales[expert]
        return values[codes.long()] * scales.repeat_interleave(self.format.group, 1)


@dataclass(frozen=True, slots=True, eq=False)
class StoredExperts:
    """A rank's experts: `w1` has N = 2·I, the gate half before the up half, and K = H; `w2` N = H and K = I.

    Attributes:
        w1: the weights of the first GEMM.
        w2: those of the second.
        generator_state: the random generator's state after the weights. Inputs continue from it.
    """

    w1: StoredMatrices
    w2: StoredMatrices
    generator_state: torch.Tensor


def random_experts(problem: Problem) -> StoredExperts:
    """Draws the experts of a problem's rank, the same for the same layer, shard and seed."""
    generator = torch.Generator(problem.device).manual_seed(problem.regime.seed)
    first, second = gemms(problem.layer, problem.regime)
    w1 = StoredMatrices.random(first, problem.layer.activation.halves, generator)
    w2 = StoredMatrices.random(second, 1, generator)
    return StoredExperts(w1, w2, generator.get_state())
