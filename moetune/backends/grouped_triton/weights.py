"""The random experts of the Triton backend, as the kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetune.backends.base import Problem
from moetune.backends.grouped_triton.quantize import GROUP, dequantize_weight, quantize_weight
from moetune.spec.enums import Precision


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMatrices:
    """One GEMM's weights of all L experts: bf16 or e4m3 `[L, N, K]`; e4m3 with f32 scales `[L, N/128, K/128]`."""

    values: torch.Tensor
    scales: torch.Tensor | None = None

    def fp32(self, expert: int) -> torch.Tensor:
        """Returns one expert's `[N, K]` in fp32."""
        if self.scales is None:
            return self.values[expert].float()
        return dequantize_weight(self.values[expert], self.scales[expert])


@dataclass(frozen=True, slots=True, eq=False)
class TritonExperts:
    """A rank's weights: `w1` has N = 2·I, the gate half before the up half, and K = H; `w2` has N = H and K = I.

    `generator_state`: the random generator's state after the weights. Inputs continue from it.
    """

    w1: ExpertMatrices
    w2: ExpertMatrices
    generator_state: torch.Tensor


def random_experts(problem: Problem) -> TritonExperts:
    """Draws normal weights of variance 1/K, the same for the same layer, shard and seed; in fp8 quantized."""
    hidden, inner, count = problem.layer.hidden_size, problem.intermediate_size, problem.shard.num_local
    fp8 = problem.layer.precision is Precision.FP8_BLOCK
    generator = torch.Generator(problem.device).manual_seed(problem.regime.seed)
    w1 = _random_matrices(count, 2 * inner, hidden, fp8, generator)
    w2 = _random_matrices(count, hidden, inner, fp8, generator)
    return TritonExperts(w1, w2, generator.get_state())


def normal(shape: tuple[int, int], deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Draws normal bf16 values on the generator's device."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.mul_(deviation).bfloat16()


def _random_matrices(count: int, N: int, K: int, fp8: bool, generator: torch.Generator) -> ExpertMatrices:
    """Draws one expert at a time, so that no fp32 copy of all is needed."""
    device = generator.device
    values = torch.empty(count, N, K, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16, device=device)
    scales = torch.empty(count, N // GROUP, K // GROUP, dtype=torch.float32, device=device) if fp8 else None
    for expert in range(count):
        drawn = normal((N, K), K**-0.5, generator)
        if scales is None:
            values[expert] = drawn
        else:
            values[expert], scales[expert] = quantize_weight(drawn)
    return ExpertMatrices(values, scales)
