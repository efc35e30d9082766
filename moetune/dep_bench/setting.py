"""`Setting`, what all points of one dep-bench share."""

from __future__ import annotations

from dataclasses import dataclass

from moetune.backends.base import Backend
from moetune.dep_bench.dispatchers import dispatcher_for
from moetune.dep_bench.experts import require_fillable
from moetune.dep_bench.payload import Format
from moetune.dep_bench.process_group import Ranks
from moetune.errors import UnsupportedError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.wire import WireActivation, WireRouting

BATCHES = 8
"""The batches of a point. Each has its own hidden states and so its own routing."""
ROUNDS = 8
"""How often each batch is timed with each arm."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The layer, its deployment, and the processes that run it.

    Attributes:
        backend: the backend of the block.
        spare: another instance of it, whose weights can be replaced.
        layer, regime: the deployment.
        form: the formats on the wire.
        ranks: the processes.
        batches, rounds: how often a point is timed.
    """

    backend: Backend
    spare: Backend
    layer: MoELayer
    regime: Regime
    form: Format
    ranks: Ranks
    batches: int = BATCHES
    rounds: int = ROUNDS


def setting_of(
    layer: MoELayer,
    regime: Regime,
    backend: Backend,
    spare: Backend,
    ranks: Ranks,
    activation: WireActivation,
    wire_routing: WireRouting | None,
    batches: int,
    rounds: int,
) -> Setting:
    """Returns the setting, after everything was checked that needs no measurement.

    The arguments are those of `run.dep_bench`, and so are the errors.
    """
    if not regime.attention_dp:
        raise UnsupportedError(
            "dep-bench measures a layer with attention DP, and this deployment has none.",
            "Give --dispatch, for example vllm:allgather_reducescatter.",
        )
    if reason := backend.unsupported(layer, regime):
        raise UnsupportedError(f"Backend {backend.name} does not compute {layer.name}: {reason}.")
    if obstacle := backend.unavailable():
        raise UnsupportedError(f"Backend {backend.name} cannot run here: {obstacle[0]}.", obstacle[1])
    require_fillable(backend, layer)
    if ranks.size == 1 and (activation != "bf16" or wire_routing is not None):
        raise UnsupportedError(
            "One process has no wire, so it has no formats on it.",
            "Leave --wire and --wire-routing out, or start several processes with torchrun.",
        )
    form = Format.of(layer, regime, activation, wire_routing)
    if ranks.size > 1:
        dispatcher_for(ranks, form, layer, regime)
    return Setting(backend, spare, layer, regime, form, ranks, batches, rounds)
