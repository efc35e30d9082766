"""The collectives of the block, with one name in all versions of torch, on NCCL and gloo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moetune.dep_bench.process_group import Ranks

# torch 2.13 has renamed them
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_together: Any = getattr(dist, "_coalescing_manager")  # noqa: B009  # torch has no public name for it


def all_gather(
    tensors: Sequence[torch.Tensor], places: Sequence[torch.Tensor | None], ranks: Ranks
) -> list[torch.Tensor]:
    """Gathers several tensors `[T, …]` in one call on NCCL, as vLLM does; gloo needs one call for each.

    Args:
        tensors: what this rank sends.
        places: where each is gathered, or None for a new tensor.
        ranks: the ranks.

    Returns:
        The tensors of all ranks, `[ranks·T, …]`, by rank.
    """
    gathered = [
        tensor.new_empty(ranks.size * len(tensor), *tensor.shape[1:]) if place is None else place
        for tensor, place in zip(tensors, places, strict=True)
    ]
    if ranks.device != "cpu" and len(tensors) > 1:
        with _together():
            for out, tensor in zip(gathered, tensors, strict=True):
                _gather(out, tensor.contiguous())
        return gathered
    for out, tensor in zip(gathered, tensors, strict=True):
        _gather(out, tensor.contiguous())
    return gathered


def reduce_scatter(out: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Returns this rank's part of the sum of all ranks' outputs `[ranks·T, H]`: `[T, H]`."""
    own = out.new_empty(len(out) // ranks.size, *out.shape[1:])
    _scatter(own, out)
    return own


def all_to_all(
    rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], place: torch.Tensor | None = None
) -> torch.Tensor:
    """Sends `sent[r]` rows to each rank r and returns the `received[r]` rows from it, by rank, in `place` if given."""
    out = rows.new_empty(sum(received), *rows.shape[1:]) if place is None else place
    dist.all_to_all_single(out, rows, list(received), list(sent))
    return out


def counts(sent: torch.Tensor) -> tuple[list[int], list[int]]:
    """Returns how many rows this rank sends to each rank, and how many it receives. The host waits for them.

    Args:
        sent: the former, int64 `[ranks]`.
    """
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent.contiguous())
    to_each, from_each = torch.stack((sent, received)).tolist()
    return to_each, from_each


def align(ranks: Ranks) -> None:
    """Makes all ranks begin together, as they do after the collective of the layer before."""
    if ranks.size > 1:
        dist.all_reduce(torch.ones(1, device=ranks.device))
