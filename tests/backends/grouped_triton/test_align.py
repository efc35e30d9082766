"""Alignment, under Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.backends.grouped_triton.align import Aligner


@st.composite
def routings(draw):
    """(ids [rows, k], all experts, first local, number of local, block size)."""
    num_experts = draw(st.integers(1, 24))
    num_local = draw(st.integers(1, num_experts))
    first = draw(st.integers(0, num_experts - num_local))
    rows, top_k = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    ids = draw(st.lists(st.integers(-1, num_experts - 1), min_size=rows * top_k, max_size=rows * top_k))
    return (
        torch.tensor(ids, dtype=torch.int32).view(rows, top_k),
        num_experts,
        first,
        num_local,
        draw(st.sampled_from([16, 64, 256])),
    )


def expected(ids, first, num_local, block_size, zero_remote):
    """Sorted slots and block experts by the definition, in plain Python."""
    flat = ids.flatten().tolist()
    groups = [[slot for slot, i in enumerate(flat) if i == first + expert] for expert in range(num_local)]
    experts = list(range(num_local))
    if zero_remote:
        groups.append([slot for slot, i in enumerate(flat) if not first <= i < first + num_local])
        experts.append(-1)
    slots, blocks = [], []
    for expert, group in zip(experts, groups, strict=True):
        count = -(-len(group) // block_size)
        slots += group + [len(flat)] * (count * block_size - len(group))
        blocks += [expert] * count
    return slots, blocks


@settings(max_examples=30)
@given(routings(), st.booleans())
def test_slots_are_sorted_by_expert_and_padded_to_blocks(routing, zero_remote):
    ids, num_experts, first, num_local, block_size = routing
    aligner = Aligner(ids.numel(), num_experts, first, num_local, zero_remote=zero_remote, device="cpu")
    aligned = aligner.align(ids, block_size)
    slots, blocks = expected(ids, first, num_local, block_size, zero_remote)
    padded = int(aligned.num_padded_slots)
    assert aligned.sorted_slots[:padded].tolist() == slots
    assert aligned.block_experts[: padded // block_size].tolist() == blocks
    assert padded <= aligned.max_padded_slots <= len(aligned.sorted_slots)


def test_more_slots_than_one_chunk_keep_their_order():
    ids = torch.arange(5000, dtype=torch.int32).remainder(7).view(-1, 1)
    aligned = Aligner(5000, 7, 2, 3, zero_remote=False, device="cpu").align(ids, 64)
    slots, blocks = expected(ids, 2, 3, 64, False)
    assert aligned.sorted_slots[: int(aligned.num_padded_slots)].tolist() == slots
    assert aligned.block_experts[: len(blocks)].tolist() == blocks


def test_no_local_slot_leaves_nothing_to_do():
    ids = torch.full((4, 2), -1, dtype=torch.int32)
    assert int(Aligner(8, 4, 0, 4, zero_remote=False, device="cpu").align(ids, 16).num_padded_slots) == 0


def test_an_aligner_serves_one_block_size_after_another():
    ids = torch.randint(0, 8, (33, 2), dtype=torch.int32)
    aligner = Aligner(ids.numel(), 8, 0, 8, zero_remote=False, device="cpu")
    for block_size in (256, 16, 64, 16):
        aligned = aligner.align(ids, block_size)
        assert (
            aligned.sorted_slots[: int(aligned.num_padded_slots)].tolist() == expected(ids, 0, 8, block_size, False)[0]
        )
