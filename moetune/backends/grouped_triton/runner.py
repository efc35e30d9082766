"""`TritonRunner`: one problem's weights, inputs and workspace, and the forward of one MoE layer on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetune.backends.base import Problem, relative_error
from moetune.backends.grouped_triton.activation import activate_and_multiply, sum_slots
from moetune.backends.grouped_triton.align import Aligner, Alignment
from moetune.backends.grouped_triton.gemm import Operands, launch, two_gemms
from moetune.backends.grouped_triton.quantize import (
    GROUP,
    dequantize_rows,
    dequantize_weight,
    quantize_rows,
    quantize_rows_reference,
    quantize_weight,
)
from moetune.backends.grouped_triton.sources import grouped_kernel
from moetune.backends.grouped_triton.space import Shapes
from moetune.spec.layer import Activation

_INPUT_BYTES = 2**29
"""Inputs of different draws differ as long as all fit in this; past it they repeat."""
_INTERPRETED_CAPABILITY = (9, 0)


class TritonRunner:
    """See `Runner`. `run` allocates nothing and never waits for the GPU, so that a CUDA graph can capture it.

    Weights: normal with variance 1/K, in fp8 those values quantized; inputs normal. Gate stands before up.
    """

    def __init__(self, problem: Problem, kernel: str, *, zero_remote: bool) -> None:
        device, shard = problem.device, problem.shard
        self._shapes = shapes = Shapes.of(problem.layer, problem.regime, problem.rows, shard.rank, kernel=kernel)
        self._grouped = grouped_kernel(kernel)
        self._gelu = problem.layer.activation is Activation.GELU
        self._first = shard.first
        capability = torch.cuda.get_device_capability(device) if device != "cpu" else _INTERPRETED_CAPABILITY
        self._gemm1, self._gemm2 = two_gemms(shapes, zero_remote, capability)
        self._zero_products = shapes.sorted and not shapes.whole_layer and not zero_remote

        generator = torch.Generator(device).manual_seed(problem.regime.seed)
        self._w1, self._w1_scales = self._weights(self._gemm1.N, self._gemm1.K, generator)
        self._w2, self._w2_scales = self._weights(self._gemm2.N, self._gemm2.K, generator)
        num_inputs = min(len(problem.routings), max(1, _INPUT_BYTES // (2 * shapes.rows * shapes.hidden_size)))
        self._inputs = [self._normal((shapes.rows, shapes.hidden_size), 1.0, generator) for _ in range(num_inputs)]
        self._topk_ids = [routing.topk_ids.to(device, torch.int32).contiguous() for routing in problem.routings]
        self._topk_weights = [
            routing.topk_weights.to(device, torch.float32).contiguous() for routing in problem.routings
        ]

        slots, hidden, intermediate = shapes.num_slots, shapes.hidden_size, shapes.intermediate_size
        bf16: Any = {"dtype": torch.bfloat16, "device": device}
        # the first GEMM's output is dead when the second writes its own: one buffer, as in vLLM
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
        """See `Runner.run`: bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        x, topk_ids = self._input(draw), self._topk_ids[draw]
        slot_weights = self._topk_weights[draw]
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            alignment = self._align(topk_ids, tactic["BLOCK_SIZE_M"])
            rows, row_scales = self._quantized(x, "_x_quantized")
            first = Operands(rows, self._w1, self._gate_up, slot_weights, row_scales, self._w1_scales)
            launch(self._grouped, self._gemm1, first, alignment, tactic)
            activate_and_multiply(self._gate_up, self._activated, gelu=self._gelu)
            rows, row_scales = self._quantized(self._activated, "_activated_quantized")
            if self._zero_products:
                self._products.zero_()
            second = Operands(rows, self._w2, self._products, slot_weights, row_scales, self._w2_scales)
            launch(self._grouped, self._gemm2, second, alignment, tactic)
            sum_slots(self._products, self._out)
        return self._out

    def reference(self, draw: int = 0) -> torch.Tensor:
        """See `Runner.reference`: the layer of these weights, as stored, on the unquantized inputs in fp32."""
        return self._reference(draw, round_like_kernel=False)

    def rounded_reference(self, draw: int = 0) -> torch.Tensor:
        """The reference with the kernel's own roundings: quantized operands, bf16 intermediates and products."""
        return self._reference(draw, round_like_kernel=True)

    def staged_errors(self, tactic: Mapping[str, Any], draw: int = 0) -> tuple[float, float]:
        """Relative Frobenius errors of both stages of a run, each against the rounded reference of its own input.

        The first stage ends with the activated intermediate. In fp8 it is quantized anew, and there one bf16 rounding
        that falls the other way can change the scale of 128 values: over the whole layer that is half a percent, and
        up to 1.1 % of a single row, which is why whole layers are judged over several. Each stage has no such leverage.
        """
        out = self.run(tactic, draw)
        activated = self._activated.clone()
        expected = torch.zeros_like(activated, dtype=torch.float32)
        expected_out = self._reference(draw, round_like_kernel=True, activated=activated, expected=expected)
        local = (self._topk_ids[draw].view(-1) >= self._first) & (
            self._topk_ids[draw].view(-1) < self._first + self._shapes.num_local
        )
        return relative_error(activated[local], expected[local]), relative_error(out, expected_out)

    def _reference(
        self,
        draw: int,
        *,
        round_like_kernel: bool,
        activated: torch.Tensor | None = None,
        expected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output; `expected` is filled with the intermediate, and `activated`, if given, goes on in its place."""

        def rounded(values: torch.Tensor) -> torch.Tensor:
            return values.bfloat16().float() if round_like_kernel else values

        def quantized(values: torch.Tensor) -> torch.Tensor:
            if not (round_like_kernel and self._shapes.fp8):
                return values
            return dequantize_rows(*quantize_rows_reference(values))

        x = quantized(self._input(draw).float())
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        activation = torch.nn.functional.silu
        for expert in range(self._shapes.num_local):
            rows, columns = torch.where(self._topk_ids[draw] == self._first + expert)
            gate, up = rounded(x[rows] @ self._weight(self._w1, self._w1_scales, expert).T).chunk(2, dim=-1)
            gated = torch.nn.functional.gelu(gate, approximate="tanh") if self._gelu else activation(gate)
            intermediate, slots = rounded(gated * up), rows * self._topk_ids[draw].shape[1] + columns
            if expected is not None:
                expected[slots] = intermediate
            if activated is not None:
                intermediate = activated[slots].float()
            products = quantized(intermediate) @ self._weight(self._w2, self._w2_scales, expert).T
            products *= self._topk_weights[draw][rows, columns].unsqueeze(1)
            out.index_add_(0, rows, rounded(products))
        return out

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

    def _weights(self, N: int, K: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Every expert's `[N, K]`, made one expert at a time so that no fp32 copy of all is needed."""
        device, count = generator.device, self._shapes.num_local
        if not self._shapes.fp8:
            weights = torch.empty(count, N, K, dtype=torch.bfloat16, device=device)
            for expert in range(count):
                weights[expert] = self._normal((N, K), K**-0.5, generator)
            return weights, None
        weights = torch.empty(count, N, K, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(count, N // GROUP, K // GROUP, dtype=torch.float32, device=device)
        for expert in range(count):
            weights[expert], scales[expert] = quantize_weight(self._normal((N, K), K**-0.5, generator))
        return weights, scales

    def _weight(self, weights: torch.Tensor, scales: torch.Tensor | None, expert: int) -> torch.Tensor:
        return weights[expert].float() if scales is None else dequantize_weight(weights[expert], scales[expert])

    @staticmethod
    def _normal(shape: tuple[int, int], deviation: float, generator: torch.Generator) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=generator.device)
        return values.mul_(deviation).bfloat16()
