"""Defines `BatchedRunner`, which computes the experts of one rank on an expert-major buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.base import Problem
from moetune.backends.batched_triton.gemm import BatchedKernel, Operands, launch, two_gemms
from moetune.backends.batched_triton.kernel import activate_filled
from moetune.backends.batched_triton.space import Shapes
from moetune.backends.grouped_triton.quantize import GROUP, quantize_rows
from moetune.backends.grouped_triton.weights import TritonExperts, normal
from moetune.backends.reference import moe_reference
from moetune.spec.layer import Activation


class BatchedRunner:
    """Runs one problem. `run` allocates nothing and never waits for the GPU, so that a CUDA graph can capture it.

    The buffer has `capacity` rows for each local expert. A draw says how many of them are filled. As in vLLM
    (`BatchedTritonExperts.apply`), the buffer between the GEMMs is set to zero in each run, in fp8 that of the first
    GEMM's output too, and in fp8 all rows between the GEMMs are quantized, because a CUDA graph knows no counts. The
    weighted sum over a token's experts belongs to the combine, so it is not part of a run.

    Args:
        problem: the problem to compute. Its inputs are drawn from a normal distribution, the same for all draws.
        experts: the weights of the problem's rank, on the problem's device.
        batched: the kernel.
    """

    def __init__(self, problem: Problem, experts: TritonExperts, batched: BatchedKernel) -> None:
        device = problem.device
        self._shapes = shapes = Shapes.of(problem.layer, problem.regime)
        self._batched, self._experts = batched, experts
        self._gelu = problem.layer.activation is Activation.GELU
        self._gemm1, self._gemm2 = two_gemms(shapes)
        self._loads = [draw.routing.load for draw in problem.draws]
        self._counts = [load.to(device, torch.int32) for load in self._loads]

        generator = torch.Generator(device)
        generator.set_state(experts.generator_state)
        num_local, capacity = shapes.num_local, shapes.capacity
        hidden, intermediate = shapes.hidden_size, shapes.intermediate_size
        bf16: Any = {"dtype": torch.bfloat16, "device": device}
        self._x = torch.empty(num_local, capacity, hidden, **bf16)
        for block in self._x:  # one expert at a time, so that no fp32 copy of all is needed
            block.copy_(normal((capacity, hidden), 1.0, generator))
        # one buffer for both GEMMs, as in vLLM: the first output is no longer needed when the second is written
        shared = torch.empty(num_local * capacity * max(2 * intermediate, hidden), **bf16)
        self._gate_up = _front(shared, num_local, capacity, 2 * intermediate)
        self._out = _front(shared, num_local, capacity, hidden)
        self._activated = torch.empty(num_local, capacity, intermediate, **bf16)
        if shapes.fp8:
            self._x_quantized = _quantized_like(self._x)
            quantize_rows(self._x, *self._x_quantized)
            self._activated_quantized = _quantized_like(self._activated)

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the experts' outputs, bf16 `[L, capacity, H]`, in a buffer that the next call overwrites.

        Only the filled rows of the draw have a meaning.
        """
        counts, w1, w2, fp8 = self._counts[draw], self._experts.w1, self._experts.w2, self._shapes.fp8
        with torch.cuda.device_of(self._x):  # type: ignore[no-untyped-call]
            rows, scales = self._x_quantized if fp8 else (self._x, None)
            if fp8:
                self._gate_up.zero_()
            first = Operands(rows, w1.values, self._gate_up, counts, scales, w1.scales)
            launch(self._batched, self._gemm1, first, tactic)
            self._activated.zero_()
            activate_filled(self._gate_up, self._activated, counts, gelu=self._gelu)
            rows, scales = self._activated_quantized if fp8 else (self._activated, None)
            if fp8:
                quantize_rows(self._activated, *self._activated_quantized)
            second = Operands(rows, w2.values, self._out, counts, scales, w2.scales)
            launch(self._batched, self._gemm2, second, tactic)
        return self._out

    def filled(self, output: torch.Tensor, draw: int) -> torch.Tensor:
        """Returns the filled rows of an output of `run`, ordered by expert: `[S, H]`."""
        return output.flatten(0, 1)[self._filled_rows(draw)]

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the filled rows in fp32, from the weights as stored and the inputs before they are quantized."""
        rows = self._filled_rows(draw)
        experts = (rows // self._shapes.capacity).unsqueeze(1)
        weights = torch.ones(experts.shape, device=rows.device)
        local = range(self._shapes.num_local)
        return moe_reference(self._x.flatten(0, 1)[rows], experts, weights, local, self._expert)

    def _filled_rows(self, draw: int) -> torch.Tensor:
        return filled_rows(self._loads[draw], self._shapes.capacity).to(self._x.device)

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ self._experts.w1.fp32(index).T).chunk(2, dim=-1)
        activate = torch.nn.functional.gelu(gate, approximate="tanh") if self._gelu else torch.nn.functional.silu(gate)
        return (activate * up) @ self._experts.w2.fp32(index).T


def filled_rows(load: torch.Tensor, capacity: int) -> torch.Tensor:
    """Returns the positions of the filled rows in a buffer, taken as `[L · capacity, …]`: int64 `[S]`, on the CPU.

    Args:
        load: the filled rows of each expert, `[L]`, on the CPU.
        capacity: the rows of each expert in the buffer.
    """
    filled = torch.arange(capacity) < load.unsqueeze(1)
    return filled.flatten().nonzero().squeeze(1)


def _front(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """Returns the first elements of a flat buffer in a shape."""
    first, second, third = shape
    return buffer[: first * second * third].view(shape)


def _quantized_like(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns empty e4m3 values and f32 scales for rows `[L, capacity, K]`."""
    *blocks, width = rows.shape
    values = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    return values, torch.empty(*blocks, width // GROUP, dtype=torch.float32, device=rows.device)
