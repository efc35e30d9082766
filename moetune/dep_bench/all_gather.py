"""Defines `AllGather`, after which every rank has the tokens of all ranks."""

from __future__ import annotations

from moetune.dep_bench import collectives
from moetune.dep_bench.dispatcher import Arrived, Place, Sent
from moetune.dep_bench.part_clock import Mark
from moetune.dep_bench.payload import Format, joined, parted
from moetune.dep_bench.process_group import Ranks


class AllGather:
    """Gathers the tokens of all ranks on every rank, and reduce-scatters the outputs."""

    is_static = True

    def __init__(self, ranks: Ranks, form: Format) -> None:
        self._ranks, self._form = ranks, form

    def dispatch(self, sent: Sent, place: Place, mark: Mark) -> Arrived:
        """See `Dispatcher`."""
        ranks, tensors = self._ranks, [sent.hidden, sent.routing]
        rows = ranks.size * len(sent.hidden)
        if self._form.in_one_buffer:
            rows_of_bytes = joined(tensors)
            mark("pack")
            (buffer,) = collectives.all_gather([rows_of_bytes], [None], ranks)
            mark("dispatch")
            hidden, routing = parted(buffer, tensors)
        else:
            hidden, routing = collectives.all_gather(tensors, [place(rows), None], ranks)
            mark("dispatch")
        received = (ranks.size - 1) * sum(tensor.nbytes for tensor in tensors)
        return Arrived(hidden, routing, received, lambda out: collectives.reduce_scatter(out, ranks))
