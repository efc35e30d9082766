"""Defines `HummingRunner`, which computes one MoE layer as the Humming experts of vLLM 0.33 do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moetune.backends.base import Problem
from moetune.backends.humming.formulas import estimated_slots
from moetune.backends.humming.gemm import Gemm, gemms
from moetune.backends.humming.weights import StoredExperts, StoredMatrices
from moetune.backends.prepared import num_inputs
from moetune.backends.reference import moe_reference, reference_activation
from moetune.spec.layer import Activation
from moetune.spec.regime import Shard


class Ops(Protocol):
    """What a runner needs of Humming. `ops.HummingOps` has it on a GPU."""

    def prepared(self, gemm: Gemm, stored: StoredMatrices) -> Any: ...
    def block_m(self, weights: Any, spelled: str, slots: int) -> int: ...
    def multiply(
        self, weights: Any, spelled: str, inputs: torch.Tensor, out: torch.Tensor, rows: Any, top_k: int, slots: int
    ) -> None: ...
    def sorter(self, rows: int, top_k: int, shard: Shard) -> Any: ...
    def scatter(self, inputs: torch.Tensor, out: torch.Tensor, rows: Any) -> None: ...
    def activate(
        self, activation: Activation, gate_up: torch.Tensor, out: torch.Tensor, num_rows: torch.Tensor | None
    ) -> None: ...
    def combine(
        self, products: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class HummingExperts:
    """A rank's experts as they are stored, and each GEMM's weights in Humming's order."""

    stored: StoredExperts
    w1: Any
    w2: Any

    @classmethod
    def of(cls, problem: Problem, stored: StoredExperts, ops: Ops) -> HummingExperts:
        """Brings stored experts into Humming's order."""
        first, second = gemms(problem.layer, problem.regime)
        return cls(stored, ops.prepared(first, stored.w1), ops.prepared(second, stored.w2))


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """The ids and weights of one draw, and the number of each slot, −1 for one that is not local: all `[M, k]`."""

    ids: torch.Tensor
    weights: torch.Tensor
    numbers: torch.Tensor


class HummingRunner:
    """Runs one problem. `run` never waits for the GPU.

    With `grouped_contiguous` GEMMs the rows are copied to their slots' places, by expert; with `indexed` ones the slots
    are aligned to the block of each GEMM, once if both have the same.

    Args:
        problem: the problem to compute. Its inputs are drawn from a normal distribution.
        experts: the weights of the problem's rank, on the problem's device.
        ops: Humming.
    """

    def __init__(self, problem: Problem, experts: HummingExperts, ops: Ops) -> None:
        self._problem, self._experts, self._ops = problem, experts, ops
        self._first, self._second = gemms(problem.layer, problem.regime)
        self._estimated = estimated_slots(problem.layer, problem.regime, problem.rows)
        device = torch.device(problem.device)
        generator = torch.Generator(problem.device)
        generator.set_state(experts.stored.generator_state)
        bf16: Any = {"dtype": torch.bfloat16, "device": device}
        rows, hidden = problem.rows, problem.layer.hidden_size
        self._inputs = [
            torch.randn(rows, hidden, generator=generator, device=device).bfloat16() for _ in range(num_inputs(problem))
        ]
        self._draws = [self._slots(draw.routing.topk_ids, draw.routing.topk_weights) for draw in problem.draws]
        self._sorter = ops.sorter(rows, problem.row_top_k, problem.shard)
        slots = rows * problem.row_top_k
        self._scattered = torch.empty(slots if self._is_grouped else 0, hidden, **bf16)
        self._gate_up = torch.empty(slots, self._first.columns, **bf16)
        self._activated = torch.empty(slots, self._second.depth, **bf16)
        self._products = torch.empty(slots, hidden, **bf16)
        self._out = torch.empty(rows, hidden, **bf16)

    @property
    def _is_grouped(self) -> bool:
        return self._first.type == "grouped_contiguous"

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        slots, x = self._draws[draw], self._inputs[draw % len(self._inputs)]
        with torch.cuda.device_of(self._out):  # type: ignore[no-untyped-call]
            places = self._grouped(tactic, slots, x) if self._is_grouped else self._indexed(tactic, slots, x)
            self._ops.combine(self._products, places, slots.weights, self._out)
        return self._out

    def _grouped(self, tactic: Mapping[str, Any], slots: _Slots, x: torch.Tensor) -> torch.Tensor:
        """Writes the products by expert, and returns the place of each slot's."""
        ops, experts = self._ops, self._experts
        rows = self._sorter.grouped(slots.ids)
        ops.scatter(x, self._scattered, rows)
        ops.multiply(experts.w1, tactic["gemm1"], self._scattered, self._gate_up, rows, 1, self._estimated)
        ops.activate(self._problem.layer.activation, self._gate_up, self._activated, rows.num_rows)
        ops.multiply(experts.w2, tactic["gemm2"], self._activated, self._products, rows, 1, self._estimated)
        return rows.places  # type: ignore[no-any-return]

    def _indexed(self, tactic: Mapping[str, Any], slots: _Slots, x: torch.Tensor) -> torch.Tensor:
        """Writes each slot's product at its number, and returns the numbers."""
        ops, experts = self._ops, self._experts
        sizes = [
            ops.block_m(weights, tactic[gemm], self._estimated)
            for gemm, weights in (("gemm1", experts.w1), ("gemm2", experts.w2))
        ]
        rows = self._sorter.indexed(slots.ids, sizes[0])
        top_k = self._problem.row_top_k
        ops.multiply(experts.w1, tactic["gemm1"], x, self._gate_up, rows, top_k, self._estimated)
        ops.activate(self._problem.layer.activation, self._gate_up, self._activated, None)
        if sizes[1] != sizes[0]:
            rows = self._sorter.indexed(slots.ids, sizes[1])
        ops.multiply(experts.w2, tactic["gemm2"], self._activated, self._products, rows, 1, self._estimated)
        return slots.numbers

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from the weights as stored: `[rows, H]`."""
        slots, shard = self._draws[draw], self._problem.shard
        local = range(shard.first, shard.first + shard.num_local)
        x = self._inputs[draw % len(self._inputs)]
        return moe_reference(x, slots.ids, slots.weights, local, self._expert)

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        stored = self._experts.stored
        projected = _product(stored.w1, index, rows)
        gate, up = projected.chunk(2, dim=-1)
        return _product(stored.w2, index, reference_activation(self._problem.layer.activation, gate, up))

    def _slots(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Slots:
        device, shard = self._problem.device, self._problem.shard
        ids = topk_ids.to(device, torch.int32).contiguous()
        is_local = (ids >= shard.first) & (ids < shard.first + shard.num_local)
        numbers = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device).view(ids.shape)
        weights = topk_weights.to(device, torch.float32).contiguous()
        return _Slots(ids, weights, torch.where(is_local, numbers, -1).int())


def _product(matrices: StoredMatrices, index: int, rows: torch.Tensor) -> torch.Tensor:
    product = rows @ matrices.fp32(index).T
    return product if matrices.bias is None else product + matrices.bias[index]
