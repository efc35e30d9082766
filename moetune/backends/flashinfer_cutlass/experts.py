"""`CutlassExperts`: one rank's random experts as `cutlass_fused_moe` reads them, and each again for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.formats import Format
from moetune.backends.reference import CLAMPED

_BIAS_DEVIATION = 0.1
_CLAMP = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
"""The op's parameters of a clamped activation, in the order of `CLAMPED`."""
Matrix = tuple[torch.Tensor, ...]
"""The values of a matrix, then its scales if it has any."""


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """Holds one expert, padded: f32 `w1` `[2·I, H]`, up before gate; `w2` `[H, I]`; bf16 biases of their rows or None.

    The weights are the numbers that the stored ones stand for.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    b1: torch.Tensor | None
    b2: torch.Tensor | None


class CutlassExperts:
    """Draws one rank's random experts, the same for the same layer, shard and seed.

    Weights are normal with a variance of 1/fan-in. The padding is zero, as in the engines.

    Attributes:
        format: how they are stored.
        hidden: H as the op gets it.
        intermediate: I/tp as the op gets it.
        first: the matrices of GEMM1 as the op reads them, each tensor `[L, …]`.
        second: those of GEMM2.
        arguments: the op's arguments that hold weights, biases and the activation's constants.
    """

    def __init__(self, problem: Problem, fmt: Format) -> None:
        self.format = fmt
        self.hidden, self.intermediate = fmt.padded(problem.layer.hidden_size, problem.intermediate_size)
        self._problem = problem
        count, layer = problem.shard.num_local, problem.layer
        self.first, self.second = self._laid_out(count)
        self.arguments: dict[str, Any] = {
            "fc1_expert_weights": self.first[0],
            "fc2_expert_weights": self.second[0],
        }
        if layer.expert_bias:
            biases = [self._biases(index) for index in range(count)]
            for name, bias in zip(("fc1_expert_biases", "fc2_expert_biases"), zip(*biases, strict=True), strict=True):
                self.arguments[name] = torch.stack(bias)
        for name, value in zip(_CLAMP, CLAMPED.get(layer.activation, ()), strict=False):
            self.arguments[name] = torch.full((count,), value, dtype=torch.float32, device=problem.device)

    def expert(self, index: int) -> Expert:
        """Returns expert `index` of this rank, drawn and quantized again."""
        w1, w2 = (self.format.load(*self.format.store(weights)) for weights in self._weights(index))
        return Expert(w1, w2, *self._biases(index)) if self._problem.layer.expert_bias else Expert(w1, w2, None, None)

    def _laid_out(self, count: int) -> tuple[Matrix, Matrix]:
        """Lays out one expert at a time, so that no fp32 copy of all is needed."""
        made: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for index in range(count):
            for tensors, weights in zip(made, self._weights(index), strict=True):
                stored = (tensor.unsqueeze(0).contiguous() for tensor in self.format.store(weights))
                _put(tensors, self.format.lay_out(*stored), index, count)
        return tuple(made[0]), tuple(made[1])

    def _weights(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws f32 `[2·I, H]`, up before gate, and `[H, I]`, padded with zeros."""
        hidden, inner = self._problem.layer.hidden_size, self._problem.intermediate_size
        generator = self._generator(2 * index)
        w1 = torch.zeros(2, self.intermediate, self.hidden, device=generator.device)
        w2 = torch.zeros(self.hidden, self.intermediate, device=generator.device)
        w1[:, :inner, :hidden] = _normal((2, inner, hidden), hidden**-0.5, generator)
        w2[:hidden, :inner] = _normal((hidden, inner), inner**-0.5, generator)
        return w1.view(-1, self.hidden), w2

    def _biases(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws bf16 `[2·I]`, up before gate, and `[H]`, padded with zeros."""
        hidden, inner = self._problem.layer.hidden_size, self._problem.intermediate_size
        generator = self._generator(2 * index + 1)
        b1 = torch.zeros(2, self.intermediate, dtype=torch.bfloat16, device=generator.device)
        b2 = torch.zeros(self.hidden, dtype=torch.bfloat16, device=generator.device)
        b1[:, :inner] = _normal((2, inner), _BIAS_DEVIATION, generator)
        b2[:hidden] = _normal((hidden,), _BIAS_DEVIATION, generator)
        return b1.view(-1), b2

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator(self._problem.device).manual_seed(self._problem.regime.seed * 65537 + number)


def _put(tensors: list[torch.Tensor], made: Sequence[torch.Tensor], index: int, count: int) -> None:
    """Puts the tensors of one expert, each `[1, …]`, into those of all. The first expert allocates them."""
    if not tensors:
        tensors.extend(tensor.new_empty((count, *tensor.shape[1:])) for tensor in made)
    for whole, part in zip(tensors, made, strict=True):
        whole[index] = part[0]


def _normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).mul_(deviation)
