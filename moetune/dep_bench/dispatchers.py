"""Chooses the dispatcher of a deployment: the one with moetune's dispatch and layout; see the glossary."""

from __future__ import annotations

from moetune.dep_bench.all_gather import AllGather
from moetune.dep_bench.all_to_all import ExactAllToAll, Pool
from moetune.dep_bench.dispatcher import Dispatcher
from moetune.dep_bench.payload import Format
from moetune.dep_bench.process_group import Ranks
from moetune.errors import UnsupportedError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime


def dispatcher_for(ranks: Ranks, form: Format, layer: MoELayer, regime: Regime) -> Dispatcher:
    """Returns the dispatcher of a regime's dispatch and layout.

    Raises:
        UnsupportedError: the ranks are not ep or tp is not 1, experts are redundant, or the layout has no dispatcher.
    """
    if regime.ep_size != ranks.size or regime.tp_size > 1:
        raise UnsupportedError(
            f"{ranks.size} ranks run ep {ranks.size} and tp 1, given ep {regime.ep_size} and tp {regime.tp_size}.",
            f"Give --ep {ranks.size} and --tp 1, or start another number of processes.",
        )
    if regime.redundant_experts:
        raise UnsupportedError(
            "dep-bench places no redundant experts on its ranks.",
            "Leave --redundant-experts out, or run one rank without torchrun.",
        )
    match regime.layout or regime.dispatch:
        case "allgather":
            return AllGather(ranks, form)
        case "deduplicated" | "slot":
            return ExactAllToAll(ranks, form, layer, regime)
        case "pool":
            return Pool(ranks, form, layer, regime)
        case other:
            raise UnsupportedError(
                f"dep-bench has no dispatcher for the layout {other}.",
                "Use --dispatch allgather, or --dispatch alltoall with --layout deduplicated, slot or pool.",
            )
