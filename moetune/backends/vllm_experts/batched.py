"""Defines `BatchedVllmRunner`, which calls vLLM's masked DeepGEMM experts on an expert-major buffer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.base import Problem
from moetune.backends.batched_triton.runner import filled_rows
from moetune.backends.grouped_triton.quantize import GROUP, quantize_rows_reference
from moetune.backends.grouped_triton.weights import TritonExperts, normal
from moetune.backends.reference import moe_reference
from moetune.backends.vllm_experts.engine import FUSED_MOE, Engine
from moetune.backends.vllm_experts.runner import silu_expert

EXPECTED_MULTIPLE = 16
"""vLLM rounds the expected rows of an expert up to a multiple of this (`estimate_expected_m`), which is the least."""


class BatchedVllmRunner:
    """Runs one problem as vLLM's `BatchedDeepGemmExperts` does behind DeepEP's low-latency dispatch.

    The rows arrive quantized, with scales that lie along the rows (column-major), and the weighted sum belongs to the
    combine. So a run has the two GEMMs, and the activation with its quantization, on the filled rows of each expert.

    vLLM chooses DeepGEMM's kernel by the rows that it expects for an expert, from the tokens of all ranks. It reads
    these from the engine's step, which there is none of here, so the runner gives it a draw's tokens.

    Args:
        problem: the problem to compute. Its inputs are drawn from a normal distribution, the same for all draws.
        engine: vLLM's experts object.
        w1, w2: the weights as `apply` gets them.
        experts: the same weights, for the reference.
    """

    def __init__(
        self, problem: Problem, engine: Engine, w1: torch.Tensor, w2: torch.Tensor, experts: TritonExperts
    ) -> None:
        self._problem, self._engine, self._experts = problem, engine, experts
        device, shard, hidden = problem.device, problem.shard, problem.layer.hidden_size
        self._capacity = capacity = problem.regime.capacity
        self._loads = [draw.routing.load for draw in problem.draws]
        metadata = importlib.import_module(f"{FUSED_MOE}.modular_kernel").ExpertTokensMetadata
        self._counts = [
            metadata(expert_num_tokens=load.to(device, torch.int32), expert_num_tokens_cpu=None) for load in self._loads
        ]
        generator = torch.Generator(device)
        generator.set_state(experts.generator_state)
        bf16: Any = {"dtype": torch.bfloat16, "device": device}
        self._x = torch.empty(shard.num_local, capacity, hidden, **bf16)
        values = torch.empty_like(self._x, dtype=torch.float8_e4m3fn)
        scales = torch.empty(shard.num_local, hidden // GROUP, capacity, device=device).transpose(1, 2)
        for index in range(shard.num_local):  # one expert at a time, so that no fp32 copy of all is needed
            self._x[index] = normal((capacity, hidden), 1.0, generator)
            values[index], scales[index] = quantize_rows_reference(self._x[index])
        self._out = torch.empty(shard.num_local, capacity, hidden, **bf16)
        first, second, _ = engine.experts.workspace_shapes(
            capacity, w1.shape[1], w1.shape[2], problem.layer.top_k, shard.num_physical, shard.num_local, None,
            engine.activation,
        )  # fmt: skip
        self._fixed: dict[str, Any] = {
            "output": self._out,
            "hidden_states": values,
            "a1q_scale": scales,
            "a2_scale": None,
            "w1": w1,
            "w2": w2,
            "topk_weights": torch.empty(1, problem.layer.top_k, device=device),
            "topk_ids": torch.zeros(1, problem.layer.top_k, dtype=torch.int32, device=device),
            "activation": engine.activation,
            "global_num_experts": shard.num_physical,
            "expert_map": None,
            "workspace13": torch.empty(first, **bf16),
            "workspace2": torch.empty(second, **bf16),
            "apply_router_weight_on_input": False,
        }

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the experts' outputs, bf16 `[L, capacity, H]`, in a buffer that the next call overwrites.

        Only the filled rows of the draw have a meaning.
        """
        self._engine.experts.estimate_expected_m = lambda **given: self._expected(draw)
        self._engine.experts.apply(expert_tokens_meta=self._counts[draw], **self._fixed)
        return self._out

    def filled(self, output: torch.Tensor, draw: int) -> torch.Tensor:
        """Returns the filled rows of an output of `run`, ordered by expert: `[S, H]`."""
        return output.flatten(0, 1)[self._filled(draw)]

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the filled rows in fp32, from the weights as stored and the inputs before they are quantized."""
        rows = self._filled(draw)
        experts = (rows // self._capacity).unsqueeze(1)
        weights = torch.ones(experts.shape, device=rows.device)
        expert = silu_expert(self._experts.w1, self._experts.w2)
        return moe_reference(self._x.flatten(0, 1)[rows], experts, weights, range(len(self._x)), expert)

    def _filled(self, draw: int) -> torch.Tensor:
        return filled_rows(self._loads[draw], self._capacity).to(self._x.device)

    def _expected(self, draw: int) -> int:
        """Returns the rows that vLLM expects for an expert in a step with the tokens of a draw."""
        slots = self._problem.draws[draw].rows * self._problem.layer.top_k
        mean = slots // self._problem.shard.num_physical
        rounded = -(-mean // EXPECTED_MULTIPLE) * EXPECTED_MULTIPLE
        return min(max(rounded, EXPECTED_MULTIPLE), self._capacity)
