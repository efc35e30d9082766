"""Defines `MarlinRunner`, which computes one MoE layer as vLLM's `fused_marlin_moe` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moetune.backends.base import Problem
from moetune.backends.marlin import op
from moetune.backends.marlin.activation import activate
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.formulas import BLOCK_SIZES_M
from moetune.backends.marlin.matrices import MarlinMatrices
from moetune.backends.marlin.space import AUTO, MOST_BLOCKS, Gemm, Tile, gemms
from moetune.backends.marlin.weights import MarlinExperts
from moetune.backends.prepared import num_inputs
from moetune.backends.reference import moe_reference, reference_activation

_DEFAULT_SMS = 132  # without a GPU only the CPU stand-ins of the tests read the workspace


@dataclass(frozen=True, slots=True, eq=False)
class _Aligned:
    """The slots by expert, each expert's padded to whole blocks, and the expert of each block."""

    slots: torch.Tensor
    experts: torch.Tensor
    num_padded: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """The ids, weights and expert map of one draw. The map is None if the rank has all experts."""

    ids: torch.Tensor
    weights: torch.Tensor
    expert_map: torch.Tensor | None

    @property
    def num_experts(self) -> int:
        return 0 if self.expert_map is None else len(self.expert_map)


class MarlinRunner:
    """Runs one problem with the ops of vLLM's library, as vLLM runs them. `run` never waits for the GPU.

    Args:
        problem: the problem to compute. Its inputs are drawn from a normal distribution.
        experts: the weights of the problem's rank, on the problem's device.
        activation: writes the activation; by default that of the layer by `activate`.
    """

    def __init__(
        self,
        problem: Problem,
        experts: MarlinExperts,
        activation: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        self._problem, self._experts, self._hidden = problem, experts, problem.layer.hidden_size
        self._activate = activation or partial(activate, problem.layer.activation)
        self._ops: Any = getattr(torch.ops, op.NAMESPACE)
        self._names = op.argument_names()
        self._first, self._second = gemms(problem.layer, problem.regime, FORMATS[problem.layer.precision])
        device = torch.device(problem.device)
        generator = torch.Generator(problem.device)
        generator.set_state(experts.generator_state)
        self._inputs = [self._drawn(generator) for _ in range(num_inputs(problem))]
        self._draws = [self._slots(draw.routing.topk_ids, draw.routing.topk_weights) for draw in problem.draws]
        self._aligned = {size: self._aligned_space(size, device) for size in BLOCK_SIZES_M}

        slots = problem.rows * problem.row_top_k
        bf16: Any = {"dtype": torch.bfloat16, "device": device}
        # one buffer for both GEMMs, as in vLLM: the first output is no longer needed when the second is written
        shared = torch.empty(slots * max(self._first.N, self._second.N), **bf16)
        self._gate_up = shared[: slots * self._first.N].view(slots, self._first.N)
        self._products = shared[: slots * self._second.N].view(slots, self._second.N)
        self._activated = torch.empty(slots, self._second.K, **bf16)
        self._out = torch.empty(problem.rows, self._second.N, **bf16)
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _DEFAULT_SMS
        self._workspace = torch.zeros(sms * MOST_BLOCKS, dtype=torch.int32, device=device)

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        slots, size, experts = self._draws[draw], tactic["block_size_m"], self._experts
        with torch.cuda.device_of(self._out):  # type: ignore[no-untyped-call]
            aligned = self._align(slots, size)
            top_k, rows = self._problem.row_top_k, self._problem.rows
            first = self._gemm(self._first, experts.w1, experts.permuted_bias1, tactic["gemm1"], rows, top_k)
            second = self._gemm(self._second, experts.w2, experts.permuted_bias2, tactic["gemm2"], rows * top_k, 1)
            self._multiply(first, self._input(draw), self._gate_up, slots, aligned, size)
            self._activate(self._gate_up, self._activated)
            self._multiply(second, self._activated, self._products, slots, aligned, size)
            products = self._products.view(rows, top_k, self._second.N)
            self._ops.moe_sum(products, self._out, *(() if slots.expert_map is None else (slots.ids, slots.expert_map)))
        return self._out[:, : self._hidden]

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from the weights as stored: `[rows, H]`."""
        slots, shard = self._draws[draw], self._problem.shard
        local = range(shard.first, shard.first + shard.num_local)
        return moe_reference(self._input(draw), slots.ids, slots.weights, local, self._expert)[:, : self._hidden]

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        experts = self._experts
        projected = rows @ experts.w1.fp32(index).T
        if experts.bias1 is not None:
            projected = projected + experts.bias1[index]
        gate, up = projected.chunk(2, dim=-1)
        products = reference_activation(self._problem.layer.activation, gate, up) @ experts.w2.fp32(index).T
        return products if experts.bias2 is None else products + experts.bias2[index]

    def _gemm(
        self, gemm: Gemm, matrices: MarlinMatrices, bias: torch.Tensor | None, tile: str, rows: int, top_k: int
    ) -> dict[str, Any]:
        """Returns the op's arguments that depend on the GEMM and its tile."""
        chosen = Tile(-1, -1, -1) if tile == AUTO else Tile.parse(tile)
        return {
            "b_q_weight": matrices.codes,
            "b_bias_or_none": bias,
            "b_scales": matrices.scales,
            "global_scale": matrices.expert_scales,
            "b_type_id": matrices.format.scalar_type,
            "top_k": top_k,
            "mul_topk_weights": gemm is self._second,
            "size_m": rows,
            "size_n": gemm.N,
            "size_k": gemm.K,
            "thread_k": chosen.thread_k,
            "thread_n": chosen.thread_n,
            "blocks_per_sm": chosen.blocks_per_sm,
        }

    def _multiply(
        self, gemm: dict[str, Any], a: torch.Tensor, c: torch.Tensor, slots: _Slots, aligned: _Aligned, size: int
    ) -> None:
        given = {
            **gemm,
            "a": a,
            "c_or_none": c,
            "workspace": self._workspace,
            "sorted_token_ids": aligned.slots,
            "expert_ids": aligned.experts,
            "num_tokens_past_padded": aligned.num_padded,
            "topk_weights": slots.weights,
            "moe_block_size": size,
        }
        getattr(self._ops, op.GEMM)(*op.ordered(self._names, given))

    def _align(self, slots: _Slots, size: int) -> _Aligned:
        aligned = self._aligned[size]
        num_experts = slots.num_experts or self._problem.shard.num_physical
        self._ops.moe_align_block_size(
            slots.ids, num_experts, size, aligned.slots, aligned.experts, aligned.num_padded, slots.expert_map
        )
        return aligned

    def _aligned_space(self, size: int, device: torch.device) -> _Aligned:
        """Returns room for the alignment, as much as vLLM's `moe_align_block_size` takes."""
        slots = self._problem.rows * self._problem.row_top_k
        num_experts = max(self._problem.shard.num_physical, *(each.num_experts for each in self._draws))
        most = slots + num_experts * (size - 1)
        if slots < num_experts:
            most = min(slots * size, most)
        int32: Any = {"dtype": torch.int32, "device": device}
        return _Aligned(torch.empty(most, **int32), torch.empty(-(-most // size), **int32), torch.empty(1, **int32))

    def _slots(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Slots:
        """Returns one draw's slots. The op reads the map at each id, so −1 becomes a non-local id.

        vLLM does so for DeepEP (`deepep_ht.py`): the last expert for the first rank, else the first. A rank that has
        all experts gets another one that is not local.
        """
        device, shard = self._problem.device, self._problem.shard
        ids, weights = topk_ids.to(device, torch.int32), topk_weights.to(device, torch.float32).contiguous()
        num_experts = shard.num_physical
        if shard.num_local == num_experts:
            if int(topk_ids.min()) >= 0:
                return _Slots(ids.contiguous(), weights, None)
            num_experts += 1
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
        expert_map[shard.first : shard.first + shard.num_local] = torch.arange(shard.num_local, dtype=torch.int32)
        non_local = 0 if shard.first else num_experts - 1
        return _Slots(torch.where(ids < 0, non_local, ids).int().contiguous(), weights, expert_map.to(device))

    def _input(self, draw: int) -> torch.Tensor:
        return self._inputs[draw % len(self._inputs)]

    def _drawn(self, generator: torch.Generator) -> torch.Tensor:
        """Draws normal rows and pads them with zeros to the kernel's hidden size."""
        rows, hidden = self._problem.rows, self._problem.layer.hidden_size
        x = torch.zeros(rows, self._first.K, dtype=torch.bfloat16, device=generator.device)
        x[:, :hidden] = torch.randn(rows, hidden, generator=generator, device=generator.device)
        return x
