"""`Setting`, what all points of one dep-bench share."""

from __future__ import annotations

from dataclasses import dataclass

from moetune.backends.base import Backend
from moetune.dep_bench.payload import Format
from moetune.dep_bench.process_group import Ranks
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

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
