"""`Block`, one MoE layer over all ranks: router, top-k, dispatch, local experts, combine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from moetune.dep_bench.dispatcher import Arrived, Dispatcher, Sent
from moetune.dep_bench.experts import Experts
from moetune.dep_bench.part_clock import Mark
from moetune.dep_bench.payload import Format
from moetune.dep_bench.router import Router
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

TacticOf = Callable[[int], Tactic]
"""Returns the tactic that runs with a number of rows."""


class Block:
    """One MoE layer with attention DP. All ranks call `run` together.

    Attributes:
        arrived: the rows and bytes that the last run has received.
    """

    def __init__(
        self, layer: MoELayer, regime: Regime, form: Format, router: Router, dispatcher: Dispatcher, experts: Experts
    ) -> None:
        self._layer, self._form, self._router = layer, form, router
        self._dispatcher, self._experts = dispatcher, experts
        self._by_slot = regime.layout == "slot"
        self.arrived = (0, 0)

    @property
    def is_static(self) -> bool:
        """Whether a CUDA graph can capture it."""
        return self._dispatcher.is_static

    def run(self, x: torch.Tensor, tactic_of: TacticOf, mark: Mark = lambda part: None) -> torch.Tensor:
        """Computes the layer for this rank's tokens.

        Args:
            x: hidden states `[T, H]`.
            tactic_of: chooses the tactic, as an engine looks it up.
            mark: is called at the end of each part.

        Returns:
            `[T, H]`, in the dtype of the experts' outputs.
        """
        sent = self._sent(x, mark)
        arrived = self._dispatcher.dispatch(sent, partial(self._place, x), mark)
        rows = len(arrived.hidden)
        self.arrived = rows, arrived.num_bytes
        out = x.new_empty(0, x.shape[1])
        if rows:
            self._fill(arrived, rows, mark)
            out = self._experts.run(rows, tactic_of(rows))
        mark("experts")
        combined = arrived.combine(out)
        mark("combine")
        return combined

    def _sent(self, x: torch.Tensor, mark: Mark) -> Sent:
        logits = self._router.logits(x)
        mark("router")
        if self._form.routing == "logits":
            return Sent(self._hidden(x, mark), logits)
        ids, weights = self._router.top_k(logits)
        in_rows = (ids.view(-1, 1), weights.view(-1, 1)) if self._by_slot else (ids, weights)
        routing = self._form.routed(*in_rows)
        nowhere = self._form.routed(torch.full_like(in_rows[0][:1], -1), torch.zeros_like(in_rows[1][:1]))
        mark("top-k")
        return Sent(self._hidden(x, mark), routing, nowhere, ids)

    def _hidden(self, x: torch.Tensor, mark: Mark) -> torch.Tensor:
        hidden = self._form.hidden(x)
        if self._form.activation != "bf16":
            mark("quantize")
        return hidden

    def _place(self, x: torch.Tensor, rows: int) -> torch.Tensor | None:
        if not rows or self._form.activation != "bf16":
            return None
        place = self._experts.inputs(rows).x
        return place if place.dtype == x.dtype else None

    def _fill(self, arrived: Arrived, rows: int, mark: Mark) -> None:
        if self._form.routing == "logits":
            ids, weights = self._router.top_k(arrived.routing)
            mark("top-k")
        else:
            ids, weights = self._form.unrouted(arrived.routing)
        self._form.fill(self._experts.inputs(rows), arrived.hidden, ids, weights)
        mark("unpack")
