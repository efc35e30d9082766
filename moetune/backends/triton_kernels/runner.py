"""Defines `KernelsRunner`, which computes one MoE layer as vLLM's `OAITritonExperts` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.base import Problem
from moetune.backends.prepared import num_inputs
from moetune.backends.reference import moe_reference, reference_activation
from moetune.backends.triton_kernels.layer import first_gemm, second_gemm
from moetune.backends.triton_kernels.routing import Slots
from moetune.backends.triton_kernels.space import Flags
from moetune.backends.triton_kernels.weights import KernelExperts


class KernelsRunner:
    """Runs one problem with `matmul_ogs`, as vLLM 0.26 … 0.33 runs it. `run` never waits for the GPU.

    The slots are sorted, the first GEMM gathers rows and applies the activation, the second one multiplies with the
    router's weights, and a row's slots are summed. vLLM finds a slot's place on the rank in `expert_map`; here it is
    known before.

    Args:
        problem: the problem to compute. Its inputs are drawn from a normal distribution.
        experts: the weights of the problem's rank, on the problem's device.
    """

    def __init__(self, problem: Problem, experts: KernelExperts) -> None:
        self._problem, self._experts = problem, experts
        shard, device = problem.shard, torch.device(problem.device)
        self._local = range(shard.first, shard.first + shard.num_local)
        hidden, columns = problem.layer.hidden_size, experts.w2.codes.shape[-1] * 2
        generator = torch.Generator(problem.device)
        generator.set_state(experts.generator_state)
        bf16: Any = {"dtype": torch.bfloat16, "device": device}
        self._inputs = [
            torch.randn(problem.rows, hidden, generator=generator, device=device).bfloat16()
            for _ in range(num_inputs(problem))
        ]
        routings = [draw.routing for draw in problem.draws]
        self._slots = [Slots.of(each.topk_ids, each.topk_weights, self._local, device) for each in routings]
        # the kernel's outputs have a dimension of their own for batches, of which there is one
        self._activated = torch.empty(1, problem.rows * problem.row_top_k, columns, **bf16)
        self._out = torch.empty(1, problem.rows, hidden, **bf16)

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        first, second = (Flags.parse(tactic[name]) for name in ("gemm1", "gemm2"))
        with torch.cuda.device_of(self._out):  # type: ignore[no-untyped-call]
            routed = self._slots[draw].routed()
            first_gemm(self._experts, self._input(draw), routed, first, self._activated)
            second_gemm(self._experts, self._activated[0], routed, second, self._out)
        return self._out[0]

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from the weights as stored: `[rows, H]`."""
        routing = self._problem.draws[draw].routing
        ids, weights = routing.topk_ids.to(self._out.device), routing.topk_weights.to(self._out.device)
        return moe_reference(self._input(draw), ids, weights, self._local, self._expert)

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        experts = self._experts
        projected = rows @ experts.w1.fp32(index).T
        if experts.bias1 is not None:
            projected = projected + experts.bias1[index]
        gate, up = projected[:, ::2], projected[:, 1::2]
        products = reference_activation(self._problem.layer.activation, gate, up) @ experts.w2.fp32(index).T
        return products if experts.bias2 is None else products + experts.bias2[index]

    def _input(self, draw: int) -> torch.Tensor:
        return self._inputs[draw % len(self._inputs)]
