"""The random experts of the Marlin backend, as the kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetune.backends.base import Problem
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.matrices import MarlinMatrices
from moetune.backends.marlin.packing import permute_bias
from moetune.backends.marlin.space import gemms

_BIAS_DEVIATION = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class MarlinExperts:
    """A rank's experts, padded: `w1` has N = 2·I, the gate half before the up half, and K = H; `w2` N = H and K = I.

    Attributes:
        w1: the weights of the first GEMM.
        w2: those of the second.
        bias1: bf16 `[L, 2·I]`, or None.
        bias2: bf16 `[L, H]`, or None.
        permuted_bias1: `bias1` in Marlin's order.
        permuted_bias2: `bias2` in Marlin's order.
        generator_state: the random generator's state after the weights. Inputs continue from it.
    """

    w1: MarlinMatrices
    w2: MarlinMatrices
    bias1: torch.Tensor | None
    bias2: torch.Tensor | None
    permuted_bias1: torch.Tensor | None
    permuted_bias2: torch.Tensor | None
    generator_state: torch.Tensor


def random_experts(problem: Problem) -> MarlinExperts:
    """Draws normal weights of variance 1/K, the same for the same layer, shard and seed, and quantizes them.

    The padding is zero, as in the engines.
    """
    layer, count, inner = problem.layer, problem.shard.num_local, problem.intermediate_size
    generator = torch.Generator(problem.device).manual_seed(problem.regime.seed)
    fmt = FORMATS[layer.precision]
    first, second = gemms(layer, problem.regime, fmt)
    halves = layer.activation.halves
    w1 = MarlinMatrices.empty(fmt, count, first.N, first.K, generator.device)
    w2 = MarlinMatrices.empty(fmt, count, second.N, second.K, generator.device)
    bias1 = torch.zeros(count, first.N, dtype=torch.bfloat16, device=generator.device) if layer.expert_bias else None
    bias2 = torch.zeros(count, second.N, dtype=torch.bfloat16, device=generator.device) if layer.expert_bias else None
    for expert in range(count):
        w1.store(expert, _padded((halves, inner, layer.hidden_size), (first.N // halves, first.K), generator))
        w2.store(expert, _padded((1, layer.hidden_size, inner), (second.N, second.K), generator))
        if bias1 is not None and bias2 is not None:
            gate_up = _normal((halves, inner), _BIAS_DEVIATION, generator)
            bias1[expert].view(halves, -1)[:, :inner] = gate_up
            bias2[expert, : layer.hidden_size] = _normal((layer.hidden_size,), _BIAS_DEVIATION, generator)
    return MarlinExperts(w1, w2, bias1, bias2, _permuted(bias1), _permuted(bias2), generator.get_state())


def _padded(shape: tuple[int, int, int], padded: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Draws `[halves, N, K]` and pads each half with zeros to `padded`; returns `[halves·N, K]`."""
    halves, N, K = shape
    drawn = torch.zeros(halves, *padded, device=generator.device)
    drawn[:, :N, :K] = _normal(shape, K**-0.5, generator)
    return drawn.view(-1, padded[1])


def _normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).mul_(deviation)


def _permuted(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else torch.stack([permute_bias(each) for each in bias])
