"""Defines the all-to-all dispatchers: with a buffer of the rows that arrive, and with a pool of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from moetune.dep_bench import collectives
from moetune.dep_bench.dispatcher import Arrived, Place, Sent
from moetune.dep_bench.part_clock import Mark
from moetune.dep_bench.payload import Format, joined, parted
from moetune.dep_bench.process_group import Ranks
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime


class _AllToAll:
    """What the all-to-all dispatchers share: which rank holds an expert, and how rows travel."""

    def __init__(self, ranks: Ranks, form: Format, layer: MoELayer, regime: Regime) -> None:
        self._ranks, self._form = ranks, form
        self._layer, self._regime = layer, regime

    @cached_property
    def _holders(self) -> torch.Tensor:
        """The rank of each expert, int64 `[E]`."""
        shards = [self._regime.shard(self._layer, rank) for rank in range(self._ranks.size)]
        counts = torch.tensor([shard.num_local for shard in shards])
        return torch.arange(len(shards)).repeat_interleave(counts).to(self._ranks.device)

    def _wanted(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns which ranks each token has a slot on: bool `[T, ranks]`."""
        chosen = self._holders[ids.long()]
        wanted = torch.zeros(len(ids), self._ranks.size, dtype=torch.bool, device=ids.device)
        return wanted.scatter_(1, chosen, True)

    def _exchange(
        self,
        tensors: Sequence[torch.Tensor],
        sent: Sequence[int],
        received: Sequence[int],
        place: Place,
        mark: Mark,
    ) -> list[torch.Tensor]:
        if self._form.in_one_buffer:
            rows = joined(tensors)
            mark("pack")
            buffer = collectives.all_to_all(rows, sent, received)
            mark("dispatch")
            return parted(buffer, tensors)
        mark("pack")
        places = [place(sum(received)), *(None for _ in tensors[1:])]
        found = [collectives.all_to_all(each, sent, received, at) for each, at in zip(tensors, places, strict=True)]
        mark("dispatch")
        return found

    def _received_bytes(self, received: Sequence[int], tensors: Sequence[torch.Tensor]) -> int:
        of_row = sum(tensor.shape[1] * tensor.element_size() for tensor in tensors)
        return of_row * (sum(received) - received[self._ranks.rank])


class ExactAllToAll(_AllToAll):
    """Sends a token once to each rank that has an expert for it, or once for each slot; nothing else arrives.

    The host learns the number of rows in each call, so no CUDA graph can capture it.
    """

    is_static = False

    def dispatch(self, sent: Sent, place: Place, mark: Mark) -> Arrived:
        """See `Dispatcher`."""
        assert sent.ids is not None
        tokens, rows, num_sent = self._destinations(sent.ids)
        to_each, received = collectives.counts(num_sent)
        mark("counts")
        tensors = [sent.hidden[tokens], sent.routing[rows]]
        hidden, routing = self._exchange(tensors, to_each, received, place, mark)

        def combine(out: torch.Tensor) -> torch.Tensor:
            returned = collectives.all_to_all(out.contiguous(), received, to_each)
            return _summed(returned, tokens, len(sent.hidden))

        return Arrived(hidden, routing, self._received_bytes(received, tensors), combine)

    def _destinations(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the token and the row of `Sent.routing` of each copy, by destination, and their number for each."""
        if self._regime.layout == "slot":
            holders = self._holders[ids.long()].flatten()
            slots = torch.argsort(holders, stable=True)
            return slots // ids.shape[1], slots, torch.bincount(holders, minlength=self._ranks.size)
        wanted = self._wanted(ids)
        tokens = wanted.T.nonzero()[:, 1]
        return tokens, tokens, wanted.sum(0)


class Pool(_AllToAll):
    """Sends each rank a block of T rows: the tokens that it has an expert for, then rows without experts.

    Every shape is fixed, so a CUDA graph can capture it. The unused rows travel too.
    """

    is_static = True

    def dispatch(self, sent: Sent, place: Place, mark: Mark) -> Arrived:
        """See `Dispatcher`."""
        assert sent.ids is not None
        assert sent.nowhere is not None
        size, tokens = self._ranks.size, len(sent.hidden)
        wanted = self._wanted(sent.ids).T
        order = (~wanted).int().argsort(dim=1, stable=True).flatten()
        used = torch.arange(tokens, device=order.device) < wanted.sum(1, keepdim=True)
        routing = torch.where(used.view(-1, 1), sent.routing[order], sent.nowhere)
        tensors, equal = [sent.hidden[order], routing], [tokens] * size
        hidden, arrived = self._exchange(tensors, equal, equal, place, mark)

        def combine(out: torch.Tensor) -> torch.Tensor:
            returned = collectives.all_to_all(out.contiguous(), equal, equal)
            return _summed(returned.masked_fill(~used.view(-1, 1), 0.0), order, tokens)

        return Arrived(hidden, arrived, self._received_bytes(equal, tensors), combine)


def _summed(returned: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the sums of the returned rows of each token, added in float32: `[count, H]`."""
    out = torch.zeros(count, returned.shape[1], dtype=torch.float32, device=returned.device)
    return out.index_add_(0, tokens, returned.float()).to(returned.dtype)
