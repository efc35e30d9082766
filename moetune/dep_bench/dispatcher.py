"""Defines what a dispatcher is: it sends tokens to the ranks of their experts, and the results back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from moetune.dep_bench.part_clock import Mark

Place = Callable[[int], torch.Tensor | None]
"""Returns where that many hidden states may be received, or None if anywhere."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The tokens of one rank.

    Attributes:
        hidden: hidden states as they travel, `[T, …]`.
        routing: what `Format.routed` made or the logits, `[T, …]`; of slots, not tokens, `[T·k, …]` in the slot layout.
        nowhere: the routing of a row without experts, `[1, …]`; None if logits travel.
        ids: the experts, int32 `[T, k]`; None if logits travel.
    """

    hidden: torch.Tensor
    routing: torch.Tensor
    nowhere: torch.Tensor | None = None
    ids: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    """The rows that enter one rank's kernel.

    Attributes:
        hidden, routing: as in `Sent`, of M rows.
        num_bytes: what this rank has received from the others.
        combine: sends the kernel's outputs `[M, H]` back, and returns the sums for this rank's tokens `[T, H]`.
    """

    hidden: torch.Tensor
    routing: torch.Tensor
    num_bytes: int
    combine: Callable[[torch.Tensor], torch.Tensor]


class Dispatcher(Protocol):
    """Dispatches the tokens of all ranks.

    Attributes:
        is_static: whether a CUDA graph can capture it, because no shape depends on the routing.
    """

    is_static: bool

    def dispatch(self, sent: Sent, place: Place, mark: Mark) -> Arrived:
        """Sends this rank's tokens, and returns the rows that arrive. It is a collective.

        It marks the ends of `counts`, `pack` and `dispatch`, as far as it has them.
        """
        ...
