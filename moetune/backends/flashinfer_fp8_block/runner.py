"""Prepares one problem for `cutlass_fused_moe` with fp8 blocks, and calls the op as vLLM does."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.base import Inputs, Problem
from moetune.backends.flashinfer_cutlass.op import activation_type
from moetune.backends.grouped_triton.weights import TritonExperts, normal
from moetune.backends.prepared import num_inputs
from moetune.backends.reference import moe_reference, reference_activation


class BlockRunner:
    """Runs one problem on its weights, inputs, routings and workspace.

    The op gets bf16 rows, global ids, and weights and scales as they are stored (vLLM 0.33, `FlashInferExperts.apply`
    with `use_deepseek_fp8_block_scale`). It drops the ids of other ranks and −1. Output and workspace are allocated
    once.

    Args:
        problem: the problem to compute. Its inputs are drawn from a normal distribution.
        experts: the weights of the problem's rank. The op takes the first half of `w1` as the up half.
    """

    def __init__(self, problem: Problem, experts: TritonExperts) -> None:
        self._op = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
        self._problem, self._experts = problem, experts
        device, regime = problem.device, problem.regime
        generator = torch.Generator(device)
        generator.set_state(experts.generator_state)
        shape = (problem.rows, problem.layer.hidden_size)
        self._inputs = [normal(shape, 1.0, generator) for _ in range(num_inputs(problem))]
        self._ids = [draw.routing.topk_ids.to(device, torch.int32).contiguous() for draw in problem.draws]
        self._weights = [draw.routing.topk_weights.to(device, torch.float32).contiguous() for draw in problem.draws]
        self._out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self._fixed: dict[str, Any] = {
            "fc1_expert_weights": experts.w1.values,
            "fc2_expert_weights": experts.w2.values,
            "output_dtype": torch.bfloat16,
            "quant_scales": [experts.w1.scales, experts.w2.scales],
            "tp_size": regime.tp_size,
            "tp_rank": 0,
            "ep_size": regime.ep_size,
            "ep_rank": problem.shard.rank,
            "output": self._out,
            "activation_type": activation_type(problem.layer),
            "use_deepseek_fp8_block_scale": True,
            "workspace_buffer": self._workspace(),
        }

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        x, ids, weights = self.inputs(draw)
        self._op(input=x, token_selected_experts=ids, token_final_scales=weights, **self._fixed)
        return self._out

    def inputs(self, draw: int = 0) -> Inputs:
        """See `FillableRunner.inputs`. Draws can share inputs, so only those of one draw should be overwritten."""
        return Inputs(self._inputs[draw % len(self._inputs)], self._ids[draw], self._weights[draw])

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from the weights as stored and the inputs before they are quantized."""
        first, count = self._problem.shard.first, self._problem.shard.num_local
        return moe_reference(*self.inputs(draw), range(first, first + count), self._expert)

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        up, gate = (rows @ self._experts.w1.fp32(index).T).chunk(2, dim=-1)
        return reference_activation(self._problem.layer.activation, gate, up) @ self._experts.w2.fp32(index).T

    def _workspace(self) -> torch.Tensor:
        problem = self._problem
        size = importlib.import_module("flashinfer.fused_moe.core").cutlass_fused_moe_workspace_size(
            problem.rows,
            problem.layer.hidden_size,
            problem.intermediate_size,
            problem.shard.num_physical,
            problem.row_top_k,
            x_dtype=torch.bfloat16,
            weight_dtype=torch.float8_e4m3fn,
            output_dtype=torch.bfloat16,
            activation_type=activation_type(problem.layer),
            tp_size=problem.regime.tp_size,
            ep_size=problem.regime.ep_size,
            ep_rank=problem.shard.rank,
            use_deepseek_fp8_block_scale=True,
            device=torch.device(problem.device),
        )
        return torch.empty(size, dtype=torch.uint8, device=problem.device)
