"""The random experts of vLLM's rivals: e4m3 in blocks with scales that are powers of two, by tensor, or by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetune.backends.base import Problem
from moetune.backends.grouped_triton.quantize import GROUP
from moetune.backends.grouped_triton.weights import TritonExperts, normal, random_experts
from moetune.backends.prepared import E4M3_MAX
from moetune.backends.vllm_experts.engine import Prepared, prepared_for_deep_gemm
from moetune.spec.enums import Precision


def block_experts(problem: Problem) -> tuple[TritonExperts, Prepared]:
    """Draws e4m3 weights in blocks of 128×128 whose scales are powers of two; also returns them as DeepGEMM reads them.

    By default vLLM rounds the scales of a checkpoint up to powers of two for DeepGEMM, and quantizes the weights anew
    (`requant_weight_ue8m0_inplace`). With scales that are such powers that changes no weight's value.
    """
    experts = random_experts(problem)
    for matrices in (experts.w1, experts.w2):
        assert matrices.scales is not None
        for values, scales in zip(matrices.values, matrices.scales, strict=True):
            rounded = torch.exp2(torch.ceil(torch.log2(scales)))
            factors = (scales / rounded).repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
            values.copy_((values.float() * factors).to(values.dtype))
            scales.copy_(rounded)
    first, second = experts.w1, experts.w2
    return experts, prepared_for_deep_gemm(first.values, second.values, first.scales, second.scales)


@dataclass(frozen=True, slots=True, eq=False)
class ScaledMatrices:
    """One GEMM's weights of all L experts: e4m3 `[L, N, K]`, and f32 scales `[L, N, 1]` or `[L, 1, 1]`."""

    values: torch.Tensor
    scales: torch.Tensor

    def fp32(self, expert: int) -> torch.Tensor:
        """Returns one expert's `[N, K]` in fp32."""
        return self.values[expert].float() * self.scales[expert]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledExperts:
    """A rank's weights: `w1` has N = 2·I, the gate half before the up half, and K = H; `w2` has N = H and K = I.

    `generator_state`: the random generator's state after the weights. Inputs continue from it.
    """

    w1: ScaledMatrices
    w2: ScaledMatrices
    generator_state: torch.Tensor


def scaled_experts(problem: Problem) -> ScaledExperts:
    """Draws normal weights of variance 1/K, with one scale an expert, or one a channel if the precision says so."""
    hidden, inner, count = problem.layer.hidden_size, problem.intermediate_size, problem.shard.num_local
    channel = problem.layer.precision is Precision.FP8_CHANNEL
    generator = torch.Generator(problem.device).manual_seed(problem.regime.seed)

    def drawn(N: int, K: int) -> ScaledMatrices:
        values = torch.empty(count, N, K, dtype=torch.float8_e4m3fn, device=problem.device)
        scales = torch.empty(count, N if channel else 1, 1, dtype=torch.float32, device=problem.device)
        for expert in range(count):  # one at a time, because all experts in fp32 would need four times the memory
            made = normal((N, K), K**-0.5, generator).float()
            scales[expert] = (made.abs().amax(1, keepdim=True) if channel else made.abs().amax()) / E4M3_MAX
            values[expert] = (made / scales[expert]).to(values.dtype)
        return ScaledMatrices(values, scales)

    w1 = drawn(2 * inner, hidden)
    w2 = drawn(hidden, inner)
    return ScaledExperts(w1, w2, generator.get_state())
