"""Prepares one problem's inputs and workspace for `cutlass_fused_moe`, and calls the op on them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.base import Inputs, Problem
from moetune.backends.flashinfer_cutlass.experts import CutlassExperts
from moetune.backends.flashinfer_cutlass.op import activation_type, require_flags
from moetune.backends.prepared import E4M3_MAX
from moetune.backends.reference import moe_reference, reference_activation


class CutlassRunner:
    """Runs one problem on its weights, inputs, routings and workspace.

    Draw d has the inputs `d … d + M − 1` of one buffer, so no row has the same input in two draws. Output and workspace
    are allocated once and the op never waits for the GPU, so a CUDA graph can capture `run`. The op gets global ids and
    drops those of other ranks and −1. Rows are padded with zeros before the op, as engines do.

    The op multiplies an expert's output with the router's weight. If the layer's input is to be multiplied, the rows
    count as multiplied already and the op gets weights of 1 (SGLang 0.5.23, `_prescale_router_weight_on_input`).
    """

    def __init__(self, problem: Problem, experts: CutlassExperts) -> None:
        self._op = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
        parameters = inspect.signature(self._op).parameters
        require_flags(parameters, experts.format)
        self._experts, self._problem = experts, problem
        device, layer, regime = problem.device, problem.layer, problem.regime
        self._inputs, self._input_scale = self._drawn()
        self._ids = [draw.routing.topk_ids.to(device, torch.int32).contiguous() for draw in problem.draws]
        self._weights = [draw.routing.topk_weights.to(device, torch.float32).contiguous() for draw in problem.draws]
        if layer.weight_on_input:
            self._weights = [torch.ones_like(weights) for weights in self._weights]
        self._out = torch.empty(problem.rows, experts.hidden, dtype=torch.bfloat16, device=device)
        self._fixed: dict[str, Any] = {
            **experts.arguments,
            **experts.format.parameters,
            "output_dtype": torch.bfloat16,
            "quant_scales": experts.format.quant_scales(experts.first, experts.second, self._input_scale),
            "tp_size": regime.tp_size,
            "tp_rank": 0,
            "ep_size": regime.ep_size,
            "ep_rank": problem.shard.rank,
            "output": self._out,
            "tune_max_num_tokens": regime.tune_max_num_tokens,
            "activation_type": activation_type(layer),
        }
        if "workspace_buffer" in parameters:
            self._fixed["workspace_buffer"] = self._workspace()

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        self._op(**self.arguments(draw), profile_ids=[tactic["gemm1"], tactic["gemm2"]])
        return self._out[:, : self._problem.layer.hidden_size]

    def inputs(self, draw: int = 0) -> Inputs:
        """See `FillableRunner.inputs`. In fp8, x is already divided by the input's scale."""
        x = self._rows(draw)[:, : self._problem.layer.hidden_size]
        return Inputs(x, self._ids[draw], self._weights[draw])

    def arguments(self, draw: int = 0) -> dict[str, Any]:
        """Returns the op's arguments on a draw without `profile_ids`. Without them FlashInfer's autotuner chooses."""
        return {
            "input": self._rows(draw),
            "token_selected_experts": self._ids[draw],
            "token_final_scales": self._weights[draw],
            **self._fixed,
        }

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from inputs and weights as the kernel multiplies them: `[rows, H]`.

        The intermediate is not rounded.
        """
        x = self._experts.format.multiplied(self._rows(draw)) * self._input_scale
        first, count = self._problem.shard.first, self._problem.shard.num_local
        out = moe_reference(x, self._ids[draw], self._weights[draw], range(first, first + count), self._expert)
        return out[:, : self._problem.layer.hidden_size]

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        expert = self._experts.expert(index)
        projected = rows @ expert.w1.T
        if expert.b1 is not None:
            projected = projected + expert.b1
        up, gate = projected.chunk(2, dim=-1)
        products = reference_activation(self._problem.layer.activation, gate, up) @ expert.w2.T
        return products if expert.b2 is None else products + expert.b2

    def _rows(self, draw: int) -> torch.Tensor:
        return self._inputs[draw : draw + self._problem.rows]

    def _drawn(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws the rows of all draws in the op's dtype, padded, and what they were divided by to fit it, f32 `[]`."""
        problem, dtype = self._problem, getattr(torch, self._experts.format.inputs)
        generator = torch.Generator(problem.device).manual_seed(problem.regime.seed + 1)
        shape = (problem.rows + len(problem.draws) - 1, problem.layer.hidden_size)
        drawn = torch.randn(shape, generator=generator, device=problem.device)
        scale = torch.ones((), device=problem.device)
        if dtype == torch.float8_e4m3fn:
            scale = drawn.abs().max() / E4M3_MAX
            drawn /= scale
        inputs = torch.zeros(shape[0], self._experts.hidden, device=problem.device)
        inputs[:, : shape[1]] = drawn
        return inputs.to(dtype), scale

    def _workspace(self) -> torch.Tensor:
        problem, experts = self._problem, self._experts
        size = importlib.import_module("flashinfer.fused_moe.core").cutlass_fused_moe_workspace_size(
            problem.rows,
            experts.hidden,
            experts.intermediate,
            problem.shard.num_physical,
            problem.row_top_k,
            x_dtype=getattr(torch, experts.format.inputs),
            weight_dtype=getattr(torch, experts.format.weights),
            output_dtype=torch.bfloat16,
            activation_type=activation_type(problem.layer),
            tp_size=problem.regime.tp_size,
            ep_size=problem.regime.ep_size,
            ep_rank=problem.shard.rank,
            device=torch.device(problem.device),
            **experts.format.parameters,
        )
        return torch.empty(size, dtype=torch.uint8, device=problem.device)
