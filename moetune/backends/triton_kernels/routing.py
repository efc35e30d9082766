"""Sorts slots by expert, as vLLM does before both GEMMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from moetune.backends.triton_kernels import package

_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """The slots of one draw.

    Attributes:
        ids: the expert's place on the rank, or −1 if it is not local: int16 `[M, k]`.
        weights: the router's weights, −1 for slots that are not local: bf16 `[M, k]`.
        num_local: L, the experts of the rank.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    num_local: int

    @classmethod
    def of(cls, topk_ids: torch.Tensor, topk_weights: torch.Tensor, local: range, device: torch.device) -> Self:
        """Returns the slots of a sampled routing with global ids, where −1 is an empty slot."""
        ids = topk_ids.to(device)
        is_local = (ids >= local.start) & (ids < local.stop)
        return cls(
            torch.where(is_local, ids - local.start, -1).to(torch.int16).contiguous(),
            torch.where(is_local, topk_weights.to(device), -1.0).bfloat16().contiguous(),
            len(local),
        )

    def routed(self) -> tuple[Any, Any, Any]:
        """Returns triton_kernels' RoutingData, GatherIndx and ScatterIndx: `make_routing_data` of vLLM 0.26 … 0.33."""
        words = -(-self.num_local // _BITS)
        bits = self._bits(words)
        bitmatrix = package.module("tensor").Bitmatrix(
            bits, shape=[len(bits), words * _BITS], shape_max=[len(bits), None], scratchpad=None
        )
        routing = package.module("routing")
        routed: tuple[Any, Any, Any] = routing.routing_from_bitmatrix(
            bitmatrix, self.weights, self.ids, self.num_local, self.ids.shape[1]
        )
        return routed

    def _bits(self, words: int) -> torch.Tensor:
        """Returns a bit for each local expert of each row: uint32 `[M, words]`. The ids of a row are distinct."""
        ids = self.ids.int()
        one = torch.where(ids < 0, 0, torch.ones_like(ids) << ids % _BITS)
        summed = torch.zeros(len(ids), words, dtype=torch.int32, device=ids.device)
        return summed.scatter_add_(1, ids.clamp(min=0).long() // _BITS, one).view(torch.uint32)
