"""Humming on a CPU: plain torch in its place, which checks what its launcher checks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moetune.backends.humming.config import Config
from moetune.backends.humming.gemm import Gemm
from moetune.backends.humming.space import AUTO
from moetune.backends.humming.weights import StoredMatrices
from moetune.backends.reference import reference_activation
from moetune.spec.regime import Shard

AUTO_BLOCK_M = 24


@dataclass(eq=False)
class Sorted:
    slots: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @property
    def num_rows(self):
        return self.offsets[-1:]


@dataclass
class Sorter:
    shard: Shard
    calls: list

    def grouped(self, ids):
        order, counts = self._by_expert(ids)
        places = torch.full((ids.numel(),), -1, dtype=torch.int32)
        places[order] = torch.arange(len(order), dtype=torch.int32)
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        return Sorted(offsets=offsets, places=places.view(ids.shape))

    def indexed(self, ids, block_m):
        self.calls.append(("aligned", block_m))
        order, counts = self._by_expert(ids)
        slots, experts, at = [], [], 0
        for expert, count in enumerate(counts):
            blocks = -(-count // block_m)
            slots += [*order[at : at + count].tolist(), *[ids.numel()] * (blocks * block_m - count)]
            experts += [expert] * blocks
            at += count
        return Sorted(torch.tensor(slots, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32))

    def _by_expert(self, ids):
        local = ids.view(-1).long() - self.shard.first
        mine = [(local == expert).nonzero().view(-1) for expert in range(self.shard.num_local)]
        return torch.cat(mine), [len(slots) for slots in mine]


@dataclass
class PlantedOps:
    """The methods of `HummingOps`.

    Attributes:
        calls: what ran: alignments and GEMMs.
    """

    calls: list = field(default_factory=list)

    def prepared(self, gemm: Gemm, stored: StoredMatrices):
        assert tuple(stored.codes.shape) == (gemm.num_experts, gemm.columns, gemm.depth // 8)
        assert tuple(stored.scales.shape) == (gemm.num_experts, gemm.columns, gemm.depth // gemm.format.group)
        assert (stored.bias is not None) == gemm.bias
        return gemm, [stored.fp32(expert) for expert in range(gemm.num_experts)], stored.bias

    def block_m(self, weights, spelled, slots):
        return AUTO_BLOCK_M if spelled == AUTO else Config.parse(spelled).block[0]

    def sorter(self, rows, top_k, shard):
        return Sorter(shard, self.calls)

    def multiply(self, weights, spelled, inputs, out, rows, top_k, slots):
        gemm, matrices, bias = weights
        self.calls.append((spelled, slots))
        assert inputs.shape[1] == gemm.depth
        assert out.shape[1] == gemm.columns
        assert out.shape[0] == inputs.shape[0] * top_k
        assert inputs.is_contiguous()
        assert out.is_contiguous()
        if gemm.type == "grouped_contiguous":
            assert top_k == 1
            assert len(rows.offsets) == gemm.num_experts + 1
            for expert in range(gemm.num_experts):
                mine = slice(int(rows.offsets[expert]), int(rows.offsets[expert + 1]))
                out[mine] = _product(matrices, bias, expert, inputs[mine])
            return
        block_m = self.block_m(weights, spelled, slots)
        assert len(rows.slots) == len(rows.experts) * block_m, "aligned to another block size"
        for block, expert in enumerate(rows.experts.tolist()):
            mine = rows.slots[block * block_m : (block + 1) * block_m].long()
            mine = mine[mine < len(out)]
            out[mine] = _product(matrices, bias, expert, inputs[mine // top_k])

    def scatter(self, inputs, out, rows):
        top_k = rows.places.shape[1]
        local = rows.places.view(-1) >= 0
        out[rows.places.view(-1)[local].long()] = inputs.repeat_interleave(top_k, 0)[local]

    def activate(self, activation, gate_up, out, num_rows):
        count = len(out) if num_rows is None else int(num_rows)
        out[:count] = reference_activation(activation, *gate_up[:count].float().chunk(2, dim=-1)).bfloat16()
        out[count:] = torch.nan

    def combine(self, products, places, weights, out):
        found = products[places.clamp(min=0).long()].float()
        found = torch.where((places >= 0).unsqueeze(-1), found * weights.unsqueeze(-1), 0.0)
        out.copy_(found.sum(1))


def _product(matrices, bias, expert, inputs):
    product = inputs.float() @ matrices[expert].T
    return (product if bias is None else product + bias[expert]).bfloat16()
