"""Sorts a rank's slots by expert for Humming's two types of GEMM, and sums what the experts return for a row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moetune.backends.grouped_triton.align import Aligner
from moetune.spec.regime import Shard

_BLOCK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Indexed:
    """The slots by expert, each expert's padded to whole blocks; all int32.

    Attributes:
        slots: the number of each slot; M·k where there is none.
        experts: the local expert of each block.
        num_padded: `[1]`, how many of `slots` are filled.
    """

    slots: torch.Tensor
    experts: torch.Tensor
    num_padded: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """The rows of all local slots without gaps, by expert; all int32.

    Attributes:
        offsets: `[L + 1]`, the first row of each expert, and the number of rows.
        places: `[M, k]`, the row of each slot; −1 for a slot that is not local.
    """

    offsets: torch.Tensor
    places: torch.Tensor

    @property
    def num_rows(self) -> torch.Tensor:
        """How many rows there are: `[1]`."""
        return self.offsets[-1:]


class SlotSorter:
    """Sorts the slots of `[rows, top_k]` ids, in buffers that are allocated once. The host never waits for the GPU.

    vLLM does the same with kernels of its own, `moe_align_block_size` and `moe_prepare_scatter`.

    Args:
        rows: M.
        top_k: the ids in a row.
        shard: the rank's experts; any other id, −1 among them, is not local.
        device: where the ids are.
    """

    def __init__(self, rows: int, top_k: int, shard: Shard, device: str) -> None:
        self._aligner = Aligner(
            rows * top_k, shard.num_physical, shard.first, shard.num_local, zero_remote=False, device=device
        )
        self._offsets = torch.empty(shard.num_local + 1, dtype=torch.int32, device=device)
        self._places = torch.empty(rows, top_k, dtype=torch.int32, device=device)

    def indexed(self, topk_ids: torch.Tensor, block_m: int) -> Indexed:
        """Returns the slots of contiguous int32 `topk_ids` in blocks of `block_m`, until the next call."""
        aligned = self._aligner.align(topk_ids, block_m)
        assert aligned.sorted_slots is not None
        return Indexed(aligned.sorted_slots, aligned.block_experts, aligned.num_padded_slots)

    def grouped(self, topk_ids: torch.Tensor) -> Grouped:
        """Returns the place of each slot of contiguous int32 `topk_ids`, until the next call."""
        sorted_ = self.indexed(topk_ids, 1)
        self._places.fill_(-1)
        _place[(len(self._offsets),)](
            sorted_.slots,
            sorted_.experts,
            sorted_.num_padded,
            self._offsets,
            self._places,
            topk_ids.numel(),
            BLOCK=_BLOCK,
        )
        return Grouped(self._offsets, self._places)


def combine(products: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the weighted sum of each row's products, computed in fp32 and rounded once.

    Args:
        products: contiguous bf16 `[P, H]`.
        places: int32 `[M, k]`, the product of each slot; −1 for a slot that is not local.
        weights: f32 `[M, k]`, the router's weights.
        out: contiguous bf16 `[M, H]`.
    """
    rows, width = out.shape
    grid = (rows, triton.cdiv(width, _BLOCK))
    _combine[grid](products, places, weights, out, width, TOP_K=places.shape[1], BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["num_slots"])
def _place(slots_ptr, experts_ptr, num_ptr, offsets_ptr, places_ptr, num_slots, BLOCK: tl.constexpr):
    """Program e writes where expert e's rows begin, and the places of its slots; the last one the number of rows."""
    expert = tl.program_id(0)
    num = tl.load(num_ptr)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, num_slots, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        filled = rows < num
        experts = tl.load(experts_ptr + rows, mask=filled, other=-1)
        before += (filled & (experts < expert)).to(tl.int32)
        mine = filled & (experts == expert)
        slots = tl.load(slots_ptr + rows, mask=mine, other=0)
        tl.store(places_ptr + slots, rows, mask=mine)
    tl.store(offsets_ptr + expert, tl.sum(before))


@triton.jit
def _combine(products_ptr, places_ptr, weights_ptr, out_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for column in tl.static_range(TOP_K):
        place = tl.load(places_ptr + row * TOP_K + column)
        weight = tl.load(weights_ptr + row * TOP_K + column)
        wanted = tl.where(place >= 0, columns, width)  # nothing of a slot that is not local
        product = tl.load(products_ptr + place.to(tl.int64) * width + columns, mask=wanted < width, other=0.0)
        total += product.to(tl.float32) * weight
    tl.store(out_ptr + row * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)
