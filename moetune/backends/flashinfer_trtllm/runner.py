"""Defines `TrtllmRunner`, which records the op's calls on one problem's weights, inputs and routings, and runs them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from moetune.backends.base import Problem
from moetune.backends.flashinfer_trtllm import arguments
from moetune.backends.flashinfer_trtllm.activations import BF16
from moetune.backends.flashinfer_trtllm.call import OpCall, record_call
from moetune.backends.flashinfer_trtllm.enumeration import to_kernel
from moetune.backends.flashinfer_trtllm.logits import (
    complete_rows,
    correction_bias,
    kernel_choice,
    kernel_routing,
    random_logits,
)
from moetune.backends.flashinfer_trtllm.weights import Weights
from moetune.backends.prepared import num_inputs
from moetune.backends.reference import moe_reference, reference_activation
from moetune.spec.tactic import Tactic
from moetune.workload.packing import pack_eager
from moetune.workload.routing import Routing

Ids = Literal["packed", "unpacked", "logits"]
"""How a call is routed: by one packed int32 a slot, by separate ids and weights, or by logits."""


class TrtllmRunner:
    """Runs one problem. `run` never waits for the GPU, so that a CUDA graph can capture it.

    Args:
        problem: the problem to compute.
        weights: the weights of the problem's rank, on its device.
        ids: how the calls are routed.
        quantized: whether activations arrive quantized; if not, `run` quantizes them.
        hidden_dtype: the dtype that `run` returns. The op writes bf16, which is cast to it.

    Raises:
        UnsupportedError: the installed FlashInfer's ops have other parameters, or no logits lead to the ids.
    """

    def __init__(
        self, problem: Problem, weights: Weights, *, ids: Ids, quantized: bool, hidden_dtype: torch.dtype
    ) -> None:
        self._problem, self._weights, self._ids = problem, weights, ids
        self._hidden_dtype = hidden_dtype
        self._quantizes = not quantized and weights.format.activations != BF16
        generator = torch.Generator(problem.device).manual_seed(problem.regime.seed + 1)
        self._inputs = [weights.input_rows(problem.rows, generator) for _ in range(num_inputs(problem))]
        self._activations = [weights.quantize(x) for x in self._inputs]
        self._output = torch.empty(
            problem.rows, weights.sizes.padded_hidden, dtype=torch.bfloat16, device=problem.device
        )
        self._choices: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._calls = [self._call(number, draw.routing) for number, draw in enumerate(problem.draws)]

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """Returns the output, `[rows, H]` in the hidden dtype. The next call overwrites it if that is bf16."""
        call = self._calls[draw]
        if self._quantizes:
            call = call.with_activations(*self._weights.quantize(self._inputs[draw % len(self._inputs)]))
        output = call.run(to_kernel(tactic))[:, : self._weights.sizes.hidden]
        return output.to(self._hidden_dtype)

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from experts and inputs before FlashInfer's layout and quantization."""
        x, first = self._inputs[draw % len(self._inputs)], self._problem.shard.first
        slots = range(first, first + self._weights.sizes.num_local)
        on_input = self._problem.layer.weight_on_input
        return moe_reference(x, *self._choices[draw], slots, self._expert, weight_on_input=on_input)

    def _expert(self, index: int, x: torch.Tensor) -> torch.Tensor:
        expert = self._weights.expert(index)
        projected = x @ expert.w1.float().T
        if expert.b1 is not None:
            projected = projected + expert.b1
        up, gate = projected.chunk(2, dim=1)
        products = reference_activation(self._problem.layer.activation, gate, up) @ expert.w2.float().T
        return products if expert.b2 is None else products + expert.b2

    def _call(self, draw: int, routing: Routing) -> OpCall:
        problem, fmt = self._problem, self._weights.format
        return record_call(
            fmt.op if self._ids == "logits" else fmt.routed_op,
            arguments.op_arguments(
                fmt,
                problem.layer,
                problem.regime,
                problem.shard,
                weights=self._weights.arguments,
                activations=self._activations[draw % len(self._activations)],
                output=self._output,
                routing=self._routing_arguments(draw, routing),
            ),
        )

    def _routing_arguments(self, draw: int, routing: Routing) -> dict[str, Any]:
        problem, device = self._problem, self._problem.device
        if self._ids == "logits":
            ids = complete_rows(routing.topk_ids, problem.shard)
            method = kernel_routing(problem.layer).within_groups(problem.shard.num_physical, ids)
            logits = random_logits(ids, problem.shard.num_physical, method, problem.regime.seed + draw)
            bias = correction_bias(problem.shard.num_physical, method, problem.regime.seed)
            chosen, weights = kernel_choice(logits, method, problem.row_top_k, bias)
            self._choices.append((chosen.to(device), weights.to(device)))
            return arguments.from_logits(method, logits.to(device), None if bias is None else bias.to(device))
        ids = routing.topk_ids.to(device, torch.int32).contiguous()
        weights = routing.topk_weights.to(device, torch.float32).contiguous()
        if self._ids == "packed":
            weights = weights.bfloat16()
        self._choices.append((ids, weights.float()))
        return arguments.routed(pack_eager(ids, weights) if self._ids == "packed" else (ids, weights))
