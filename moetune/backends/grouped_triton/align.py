"""Slots sorted by expert, every expert's group padded to whole blocks, without the host waiting for the GPU."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moetune.backends.grouped_triton.space import max_padded_slots

_LARGEST_BLOCK_SIZE_M = 256
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where each slot's row goes, as the grouped GEMM reads it; all int32 on the device.

    `sorted_slots`: slot numbers (row · k + column), group by group, each group padded with `num_slots` to
    whole blocks. `block_experts`: the local expert of each block, −1 for one of remote slots. `num_padded_slots` [1]:
    how much of `sorted_slots` is filled; a GEMM's blocks past it have nothing to do. The host knows `max_padded_slots`
    only. Where `sorted_slots` is None, block b holds slot b alone.
    """

    sorted_slots: torch.Tensor | None
    block_experts: torch.Tensor
    num_padded_slots: torch.Tensor
    max_padded_slots: int
    num_slots: int


class Aligner:
    """Aligns the slots of `[rows, top_k]` ids for any block size, in buffers that are allocated once.

    Args:
        num_slots: rows · top_k.
        num_experts: all expert slots of the layer; their number bounds the padding, as in vLLM.
        first, num_local: the rank's shard; any other id, −1 among them, is remote.
        zero_remote: remote slots make a group of their own, of expert −1 (vLLM before 0.20, SGLang); otherwise
            they are dropped (vLLM from 0.20).
    """

    def __init__(
        self, num_slots: int, num_experts: int, first: int, num_local: int, *, zero_remote: bool, device: str
    ) -> None:
        self._num_slots, self._first, self._num_local = num_slots, first, num_local
        self._num_groups = num_local + zero_remote
        self._most_groups = max(num_experts, self._num_groups)
        capacity = max_padded_slots(num_slots, self._most_groups, _LARGEST_BLOCK_SIZE_M)
        most_blocks = max_padded_slots(num_slots, self._most_groups, 1)
        self._counts = torch.empty(self._num_groups, dtype=torch.int32, device=device)
        self._sorted_slots = torch.empty(capacity, dtype=torch.int32, device=device)
        self._block_experts = torch.empty(most_blocks, dtype=torch.int32, device=device)
        self._num_padded_slots = torch.empty(1, dtype=torch.int32, device=device)

    def align(self, topk_ids: torch.Tensor, block_size: int) -> Alignment:
        """Aligns contiguous int32 `topk_ids`; the buffers of the previous alignment are overwritten."""
        grid = (self._num_groups,)
        shape = {"NUM_LOCAL": self._num_local, "CHUNK": _CHUNK if self._num_slots > 1024 else 1024, "num_warps": 8}
        _count_slots[grid](topk_ids, self._counts, self._num_slots, self._first, **shape)
        _place_slots[grid](
            topk_ids,
            self._counts,
            self._sorted_slots,
            self._block_experts,
            self._num_padded_slots,
            self._num_slots,
            self._first,
            block_size,
            NUM_GROUPS=self._num_groups,
            ALL_GROUPS=triton.next_power_of_2(self._num_groups),
            LARGEST_BLOCK=_LARGEST_BLOCK_SIZE_M,
            **shape,
        )
        return Alignment(
            self._sorted_slots,
            self._block_experts,
            self._num_padded_slots,
            max_padded_slots(self._num_slots, self._most_groups, block_size),
            self._num_slots,
        )


@triton.jit
def _groups_of(ids, first, NUM_LOCAL: tl.constexpr):
    """The local expert of each id, `NUM_LOCAL` for a remote one."""
    local = ids - first
    return tl.where((local >= 0) & (local < NUM_LOCAL), local, NUM_LOCAL)


@triton.jit(do_not_specialize=["num_slots", "first"])
def _count_slots(ids_ptr, counts_ptr, num_slots, first, NUM_LOCAL: tl.constexpr, CHUNK: tl.constexpr):
    group = tl.program_id(0)
    mine = tl.zeros((CHUNK,), dtype=tl.int32)
    for start in range(0, num_slots, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1)
        mine += ((_groups_of(ids, first, NUM_LOCAL) == group) & (slots < num_slots)).to(tl.int32)
    tl.store(counts_ptr + group, tl.sum(mine))


@triton.jit(do_not_specialize=["num_slots", "first", "block_size"])
def _place_slots(
    ids_ptr,
    counts_ptr,
    sorted_slots_ptr,
    block_experts_ptr,
    num_padded_slots_ptr,
    num_slots,
    first,
    block_size,
    NUM_LOCAL: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    LARGEST_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program g writes group g's part of `sorted_slots` and `block_experts`, its slots in ascending order."""
    group = tl.program_id(0)
    groups = tl.arange(0, ALL_GROUPS)
    counts = tl.load(counts_ptr + groups, mask=groups < NUM_GROUPS, other=0)
    blocks = (counts + block_size - 1) // block_size
    first_block = tl.sum(tl.where(groups < group, blocks, 0))
    count = tl.sum(tl.where(groups == group, counts, 0))
    num_blocks = (count + block_size - 1) // block_size
    if group == 0:
        tl.store(num_padded_slots_ptr, tl.sum(blocks) * block_size)

    expert = tl.where(group < NUM_LOCAL, group, -1)
    for start in range(0, num_blocks, LARGEST_BLOCK):
        block = start + tl.arange(0, LARGEST_BLOCK)
        experts = tl.zeros((LARGEST_BLOCK,), dtype=tl.int32) + expert
        tl.store(block_experts_ptr + first_block + block, experts, mask=block < num_blocks)

    sorted_slots_ptr += first_block * block_size
    padding = count + tl.arange(0, LARGEST_BLOCK)
    nothing = tl.zeros((LARGEST_BLOCK,), dtype=tl.int32) + num_slots
    tl.store(sorted_slots_ptr + padding, nothing, mask=padding < num_blocks * block_size)

    if count > 0:
        placed = 0
        for start in range(0, num_slots, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1)
            mine = (_groups_of(ids, first, NUM_LOCAL) == group) & (slots < num_slots)
            ranks = tl.cumsum(mine.to(tl.int32), 0)
            tl.store(sorted_slots_ptr + placed + ranks - 1, slots, mask=mine)
            placed += tl.sum(mine.to(tl.int32))
