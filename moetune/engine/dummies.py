"""`Dummies`: puts sampled routings of a regime into the inputs of an engine's op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moetune.engine.flashinfer_ops import MoEOp
from moetune.engine.tuner_call import TunerCall
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

if TYPE_CHECKING:
    from moetune.workload.draws import Draw, DrawKind
    from moetune.workload.routing import Routing


@dataclass(frozen=True)
class Dummies:
    """Samples a regime's routings and puts them into the inputs of one tuner call.

    The regime has one distribution. `distribution` is the name that the draws get, see `workload.draws.named_parts`.
    """

    layer: MoELayer
    regime: Regime
    op: MoEOp
    call: TunerCall
    distribution: str = ""

    def hook(self, tensors: list[Any]) -> list[Any]:
        """Returns the tensors with the bucket's first draw in them: FlashInfer's `inputs_pre_hook`.

        Tensors of a row count that is no bucket of the regime are returned unchanged.
        """
        rows = self.call.rows_of(tensors)
        if rows not in self.regime.buckets:
            return tensors
        (draw,) = self.draws(rows, [0], "search")
        return self.placed(tensors, draw.routing)

    def draws(self, rows: int, numbers: Iterable[int], kind: DrawKind) -> tuple[Draw, ...]:
        """Returns the bucket's draws of these numbers, each with as many rows as the op's tensors have."""
        from moetune.workload.draws import sampled

        name = self.distribution
        return sampled(self.layer, self.regime, rows, self.typical_rows(rows), numbers, kind, self.op.rank, 0, name)

    def typical_rows(self, rows: int) -> int:
        """Returns the bucket's typical rows, at most `rows`: the op's tensors hold no more."""
        from moetune.workload.draws import typical_rows

        typical = min(rows, typical_rows(self.layer, self.regime, rows, self.op.rank))
        return typical - typical % self.regime.ep_size if self.regime.layout == "pool" else typical

    def stressed(self, draw: Draw, factor: int) -> Draw:
        """Returns the stress draw of `draw` whose busiest expert has `factor` times its load."""
        from moetune.workload.draws import stressed

        return stressed(self.layer, self.regime, draw, factor, self.op.rank)

    def placed(self, tensors: Sequence[Any], routing: Routing) -> list[Any]:
        """Returns the tensors with `routing` in them.

        Raises:
            UnsupportedError: no router logits produce the ids of `routing`.
        """
        shard = self.regime.shard(self.layer, self.op.rank)
        return self.op.place(tensors, routing, self.layer, shard, self.call.arguments.get("routing_bias"))
