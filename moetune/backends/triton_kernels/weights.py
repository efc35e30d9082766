"""The random experts of the backend `triton-kernels`, as the kernel reads them, and in plain order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from moetune.backends.base import Problem
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.matrices import group_scales, nearest_codes
from moetune.backends.triton_kernels import package
from moetune.backends.triton_kernels.space import DEPTH, GROUP, MULTIPLE, NUM_WARPS
from moetune.spec.enums import Precision

_BIAS_DEVIATION = 0.1
_E8M0_BIAS = 127
_FORMAT = FORMATS[Precision.MXFP4]


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Matrices:
    """The weights `[N, K]` of each of L experts in plain order.

    Attributes:
        codes: two e2m1 values a byte, the first in the low bits: uint8 `[L, N, K/2]`.
        scales: e8m0, one for 32 values along K: uint8 `[L, N, K/32]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, count: int, N: int, K: int, device: torch.device) -> Self:
        """Returns matrices without values, to be filled by `store`."""
        uint8: Any = {"dtype": torch.uint8, "device": device}
        return cls(torch.empty(count, N, K // 2, **uint8), torch.empty(count, N, K // GROUP, **uint8))

    def store(self, expert: int, weights: torch.Tensor) -> None:
        """Quantizes one expert's weights `[N, K]`, f32. All-zero groups stay zero."""
        groups = weights.reshape(weights.shape[0], -1, GROUP)
        scales, _ = group_scales(_FORMAT, groups)
        low, high = nearest_codes(_FORMAT, groups, scales).reshape(weights.shape[0], -1, 2).unbind(-1)
        self.codes[expert] = low | high << 4
        self.scales[expert] = (scales.log2() + _E8M0_BIAS).to(torch.uint8)

    def fp32(self, expert: int) -> torch.Tensor:
        """Returns one expert's weights in fp32: `[N, K]`."""
        values = torch.tensor(_FORMAT.values, device=self.codes.device)
        codes = self.codes[expert]
        numbers = values[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
        return numbers * (self.scales[expert].float() - _E8M0_BIAS).exp2().repeat_interleave(GROUP, -1)

    def swizzled(self) -> tuple[Any, Any]:
        """Returns the weights in the kernel's order, and the precision config with their scales.

        As `_swizzle_mxfp4` of vLLM 0.26 … 0.33 does it on Hopper. K is the second dimension there.
        """
        tensor, layout = package.module("tensor"), package.module("tensor_details.layout")
        codes = tensor.wrap_torch_tensor(self.codes.transpose(-2, -1), dtype=tensor.FP4)
        padding = -self.scales.shape[-1] % (DEPTH // GROUP)
        scales = torch.nn.functional.pad(self.scales, (0, padding)).transpose(-2, -1)
        values = tensor.convert_layout(codes, layout.HopperMXValueLayout, mx_axis=1)
        scaled = tensor.convert_layout(
            tensor.wrap_torch_tensor(scales), layout.HopperMXScaleLayout, mx_axis=1, num_warps=NUM_WARPS
        )
        return values, package.module("matmul_ogs").PrecisionConfig(weight_scale=scaled)


@dataclass(frozen=True, slots=True, eq=False)
class KernelExperts:
    """A rank's experts: `w1` has N = 2·I, where gate and up take turns, and K = H; `w2` has N = H and K = I.

    Attributes:
        w1: the weights of the first GEMM in plain order.
        w2: those of the second.
        swizzled1: `w1` as the kernel reads it: triton_kernels' Tensor and PrecisionConfig.
        swizzled2: `w2` likewise.
        bias1: f32 `[L, 2·I]`, or None.
        bias2: f32 `[L, H]`, or None.
        generator_state: the random generator's state after the weights. Inputs continue from it.
    """

    w1: Mxfp4Matrices
    w2: Mxfp4Matrices
    swizzled1: tuple[Any, Any]
    swizzled2: tuple[Any, Any]
    bias1: torch.Tensor | None
    bias2: torch.Tensor | None
    generator_state: torch.Tensor


def random_experts(problem: Problem) -> KernelExperts:
    """Draws normal weights of variance 1/K, the same for the same layer, shard and seed, and quantizes them.

    I/tp is padded with zeros, as in vLLM.
    """
    layer, count, inner = problem.layer, problem.shard.num_local, problem.intermediate_size
    hidden, padded = layer.hidden_size, inner + -inner % MULTIPLE
    generator = torch.Generator(problem.device).manual_seed(problem.regime.seed)
    device = generator.device
    w1 = Mxfp4Matrices.empty(count, 2 * padded, hidden, device)
    w2 = Mxfp4Matrices.empty(count, hidden, padded, device)
    bias1 = torch.zeros(count, 2 * padded, device=device) if layer.expert_bias else None
    bias2 = torch.zeros(count, hidden, device=device) if layer.expert_bias else None
    for expert in range(count):
        first = torch.zeros(2 * padded, hidden, device=device)
        first[: 2 * inner] = _normal((2 * inner, hidden), hidden**-0.5, generator)
        second = torch.zeros(hidden, padded, device=device)
        second[:, :inner] = _normal((hidden, inner), inner**-0.5, generator)
        w1.store(expert, first)
        w2.store(expert, second)
        if bias1 is not None and bias2 is not None:
            bias1[expert, : 2 * inner] = _normal((2 * inner,), _BIAS_DEVIATION, generator)
            bias2[expert] = _normal((hidden,), _BIAS_DEVIATION, generator)
    return KernelExperts(w1, w2, w1.swizzled(), w2.swizzled(), bias1, bias2, generator.get_state())


def _normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).mul_(deviation)
