"""Makes random logits and exactly balanced orders of experts.

All random numbers come from a CPU generator that the SHA-256 of the arguments seeds. So ids do not depend on device,
process or thread count. Numbers that are sorted are float64, where ties are negligible.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import torch


def seeded_generator(*key: object) -> torch.Generator:
    """Returns a CPU generator whose state depends on the representation of `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_logits(generator: torch.Generator, rows: int, num_experts: int) -> torch.Tensor:
    """Returns independent standard normal router logits, float64 `[rows, num_experts]`."""
    return torch.randn(rows, num_experts, dtype=torch.float64, generator=generator)


def uniform_subsets(generator: torch.Generator, rows: int, population: int, size: int) -> torch.Tensor:
    """Returns, for each row, `size` distinct numbers below `population` in random order, int64 `[rows, size]`.

    Every ordered choice is equally likely, so the first c of a row are a uniform c-subset. This is Floyd's algorithm
    (Bentley and Floyd, "A sample of brilliance", CACM 30(9), 1987). Each step is done for all rows at once, and each
    row is shuffled at the end.
    """
    chosen = torch.empty(rows, size, dtype=torch.int64)
    for column in range(size):
        last = population - size + column
        pick = torch.randint(last + 1, (rows,), generator=generator)
        taken = (chosen[:, :column] == pick.unsqueeze(1)).any(1)
        chosen[:, column] = torch.where(taken, last, pick)
    return chosen.gather(1, torch.rand(rows, size, dtype=torch.float64, generator=generator).argsort(1))


def quotas(probabilities: Sequence[float], total: int) -> list[int]:
    """Returns integers that add up to `total` in the proportions of `probabilities`, by largest remainders."""
    scale = total / sum(probabilities)
    shares = [probability * scale for probability in probabilities]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleaved_order(generator: torch.Generator, shard_sizes: Sequence[int], own: int) -> torch.Tensor:
    """Returns a random order of all physical experts that visits the shards in turn, int32 `[sum(shard_sizes)]`.

    Any stretch of it spreads over the shards as evenly as possible. The shard of rank `own` comes first, so its load is
    rounded up, and it is not idle while another rank has two slots.
    """
    ep_size, widest = len(shard_sizes), max(shard_sizes)
    sizes = torch.tensor(shard_sizes)
    keys = torch.rand(ep_size, widest, dtype=torch.float64, generator=generator)
    absent = torch.arange(widest) >= sizes.unsqueeze(1)
    within = keys.masked_fill_(absent, 2.0).argsort(1)
    slots = (within + (sizes.cumsum(0) - sizes).unsqueeze(1)).masked_fill_(within >= sizes.unsqueeze(1), -1)
    turns = (torch.randperm(ep_size - 1, generator=generator) + own + 1) % ep_size
    order = torch.cat((slots[own : own + 1], slots[turns])).T.flatten()
    return order[order >= 0].int()


def spaced_order(generator: torch.Generator, num_slots: int, num_experts: int, gap: int) -> torch.Tensor | None:
    """Returns a random cyclic order of all physical experts with the copies of an expert at least `gap` apart.

    There are `num_slots` physical experts, and physical expert s is a copy of expert s mod `num_experts`. The result is
    int32 `[num_slots]`, or None where no such order exists: an expert with c = ⌈num_slots / num_experts⌉ copies needs
    c·gap ≤ num_slots.

    With m = num_slots mod num_experts, m experts have one copy more than the others. First the physical experts of the
    others are listed, copy after copy in one fixed order. This list is cut into c equal pieces, and the m experts are
    put before each piece. So each of the m experts returns after at least ⌊num_slots / c⌋ places, and each of the
    others after at least num_experts.
    """
    copies, more = divmod(num_slots, num_experts)
    if more and (copies + 1) * gap > num_slots:
        return None
    frequent = torch.randperm(more, generator=generator)
    others = torch.randperm(num_experts - more, generator=generator) + more
    pieces = _all_copies(others, copies, num_experts).tensor_split(copies + bool(more))
    return torch.cat([part for i, piece in enumerate(pieces) for part in (frequent + i * num_experts, piece)]).int()


def saturated_rows(generator: torch.Generator, rows: int, top_k: int, num_slots: int, num_experts: int) -> torch.Tensor:
    """Returns the most even rows if no `spaced_order` of gap `top_k` exists, int32 `[rows, top_k]`.

    Some experts have one copy more than the others. Their copies cannot get as much load as other copies, even if every
    row has one of them. So every row has one copy of each of these experts, in turn, and the copies of the other
    experts are dealt cyclically. Among the copies of either kind, counts differ by at most one.
    """
    copies, more = divmod(num_slots, num_experts)
    turn = torch.arange(rows).unsqueeze(1) % (copies + 1)
    frequent = torch.randperm(more, generator=generator) + turn * num_experts
    others = torch.randperm(num_experts - more, generator=generator) + more
    dealt = deal(_all_copies(others, copies, num_experts).int(), rows, top_k - more)
    return torch.cat((frequent, dealt), dim=1).int()


def deal(order: torch.Tensor, rows: int, top_k: int) -> torch.Tensor:
    """Returns the entries of `order` (int32 or float32) dealt cyclically: `[rows, top_k]`, filled row by row.

    The counts of any two entries differ by at most one. The entries are copied in Python, because torch would wake its
    thread pool for this, which costs many times the copying itself on a busy host.
    """
    code = {torch.int32: "i", torch.float32: "f"}[order.dtype]
    total = rows * top_k
    entries = array(code, order.flatten().tolist())
    return torch.frombuffer(entries * -(-total // len(entries)), dtype=order.dtype)[:total].view(rows, top_k)


def deal_counts(order: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the entries of `order` dealt cyclically, `counts[t]` to row t and then −1: `[len(counts), width]`."""
    column = torch.arange(width)
    entry = (counts.cumsum(0) - counts).unsqueeze(1) + column
    return order[entry % len(order)].masked_fill_(column >= counts.unsqueeze(1), -1)


def _all_copies(experts: torch.Tensor, copies: int, num_experts: int) -> torch.Tensor:
    return (experts + torch.arange(copies).unsqueeze(1) * num_experts).flatten()
