"""Defines `TritonRunner`, which computes one MoE layer on the weights, inputs and workspace of one problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.base import Inputs, Problem
from moetune.backends.grouped_triton.activation import activate_and_multiply, sum_slots
from moetune.backends.grouped_triton.align import Aligner, Alignment
from moetune.backends.grouped_triton.gemm import Operands, launch, two_gemms
from moetune.backends.grouped_triton.kernel_versions import NEWEST, KernelVersion
from moetune.backends.grouped_triton.quantize import GROUP, quantize_rows
from moetune.backends.grouped_triton.sources import grouped_kernel
from moetune.backends.grouped_triton.space import Shapes
from moetune.backends.grouped_triton.weights import TritonExperts, normal
from moetune.backends.prepared import num_inputs
from moetune.backends.reference import moe_reference
from moetune.spec.layer import Activation

_INTERPRETED_CAPABILITY = (9, 0)


class TritonRunner:
    """Runs one problem. `run` allocates nothing and never waits for the GPU, so that a CUDA graph can capture it.

    Args:
        problem: the problem to compute. Its inputs are drawn from a normal distribution.
        experts: the weights of the problem's rank, on the problem's device.
        kernel: the name of the grouped GEMM that runs; see `sources`.
        zero_remote: whether blocks of non-local slots write zeros.
        version: what vLLM's kernel does in the version that is measured. A kernel of an installed engine ignores it.
    """

    def __init__(
        self,
        problem: Problem,
        experts: TritonExperts,
        kernel: str,
        *,
        zero_remote: bool,
        version: KernelVersion = NEWEST,
    ) -> None:
        device, shard = problem.device, problem.shard
        self._shapes = shapes = Shapes.of(
            problem.layer, problem.regime, problem.rows, shard.rank, kernel=kernel, version=version
        )
        self._grouped = grouped_kernel(kernel)
        self._gelu = problem.layer.activation is Activation.GELU
        self._first = shard.first
        capability = torch.cuda.get_device_capability(device) if device != "cpu" else _INTERPRETED_CAPABILITY
        self._gemm1, self._gemm2 = two_gemms(shapes, zero_remote, capability)
        self._zero_products = shapes.sorted and not shapes.whole_layer and not zero_remote

        self._experts = experts
        generator = torch.Generator(device)
        generator.set_state(experts.generator_state)
        self._inputs = [normal((shapes.rows, shapes.hidden_size), 1.0, generator) for _ in range(num_inputs(problem))]
        self._topk_ids = [draw.routing.topk_ids.to(device, torch.int32).contiguous() for draw in problem.draws]
        self._topk_weights = [
            draw.routing.topk_weights.to(device, torch.float32).contiguous() for draw in problem.draws
        ]

        slots, hidden, intermediate = shapes.num_slots, shapes.hidden_size, shapes.intermediate_size
        bf16: Any = {"dtype": torch.bfloat16, "device": device}
        # one buffer for both GEMMs, as in vLLM: the first output is no longer needed when the second is written
        shared = torch.empty(slots * max(2 * intermediate, hidden), **bf16)
        self._gate_up = shared[: slots * 2 * intermediate].view(slots, 2 * intermediate)
        self._products = shared[: slots * hidden].view(shapes.rows, shapes.top_k, hidden)
        self._activated = torch.empty(slots, intermediate, **bf16)
        self._out = torch.empty(shapes.rows, hidden, **bf16)
        if shapes.fp8:
            self._x_quantized = self._workspace(shapes.rows, hidden)
            self._activated_quantized = self._workspace(slots, intermediate)
        if shapes.sorted:
            self._aligner = Aligner(
                slots,
                shapes.num_groups(zero_remote),
                shard.first,
                shapes.num_local,
                zero_remote=zero_remote,
                device=device,
            )
        else:
            self._all_slots = torch.full((1,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        x, topk_ids = self._input(draw), self._topk_ids[draw]
        slot_weights, w1, w2 = self._topk_weights[draw], self._experts.w1, self._experts.w2
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            alignment = self._align(topk_ids, tactic["BLOCK_SIZE_M"])
            rows, row_scales = self._quantized(x, "_x_quantized")
            first = Operands(rows, w1.values, self._gate_up, slot_weights, row_scales, w1.scales)
            launch(self._grouped, self._gemm1, first, alignment, tactic)
            activate_and_multiply(self._gate_up, self._activated, gelu=self._gelu)
            rows, row_scales = self._quantized(self._activated, "_activated_quantized")
            if self._zero_products:
                self._products.zero_()
            second = Operands(rows, w2.values, self._products, slot_weights, row_scales, w2.scales)
            launch(self._grouped, self._gemm2, second, alignment, tactic)
            sum_slots(self._products, self._out)
        return self._out

    def inputs(self, draw: int = 0) -> Inputs:
        """See `FillableRunner.inputs`. Draws can share inputs, so only those of one draw should be overwritten."""
        return Inputs(self._input(draw), self._topk_ids[draw], self._topk_weights[draw])

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from the weights as stored and the inputs before they are quantized."""
        slots = range(self._first, self._first + self._shapes.num_local)
        return moe_reference(self._input(draw), self._topk_ids[draw], self._topk_weights[draw], slots, self._expert)

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        return self._activate(rows @ self._experts.w1.fp32(index).T) @ self._experts.w2.fp32(index).T

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if self._gelu:
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        return torch.nn.functional.silu(gate) * up

    def _align(self, topk_ids: torch.Tensor, block_size: int) -> Alignment:
        if self._shapes.sorted:
            return self._aligner.align(topk_ids, block_size)
        slots = self._shapes.num_slots
        return Alignment(None, topk_ids.view(-1), self._all_slots, slots * block_size, slots)

    def _input(self, draw: int) -> torch.Tensor:
        return self._inputs[draw % len(self._inputs)]

    def _quantized(self, values: torch.Tensor, workspace: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._shapes.fp8:
            return values, None
        quantized, scales = getattr(self, workspace)
        quantize_rows(values, quantized, scales)
        return quantized, scales

    def _workspace(self, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._out.device
        return (
            torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(rows, width // GROUP, dtype=torch.float32, device=device),
        )
