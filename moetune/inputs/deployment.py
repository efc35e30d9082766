"""Reads a deployment from an engine's launch line, or from the name of an engine's dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moetune.inputs import dispatcher
from moetune.inputs.options import launched
from moetune.inputs.presets import layer as layer_of
from moetune.spec.enums import RankWord
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a launch line deploys.

    `rank` and `backend` are arguments of `plan` and `tune`; `rank` is None if the line leaves it open, and `backend` is
    `auto` if the line does not name kernels. `warnings` say what in the line was not understood or matters later.
    """

    layer: MoELayer
    regime: Regime
    rank: RankWord | int | None = None
    backend: str = "auto"
    warnings: tuple[str, ...] = ()


def from_launch(line: str, **options: Any) -> Deployment:
    """Reads the command that starts an engine's server, such as `vllm serve …`.

    Args:
        line: the command as a shell, a container or a Dockerfile has it.
        options: options of the command line, such as `ep=8` or `draws=4`; they win over the line.

    Raises:
        UsageError: no server or several, an unknown model, or a value that cannot be used.
        UnsupportedError: kernels, a dispatcher or a quantization that moetune does not tune.
    """
    found, backend = launched(line, options)
    return Deployment(found.layer, found.regime, found.rank, backend or "auto", found.warnings)


def regime(name: str, layer: MoELayer | str, ep_size: int, **fields: Any) -> Regime:
    """Returns the regime of an engine's dispatcher, such as `vllm:deepep_high_throughput`.

    Args:
        name: `ENGINE:NAME`.
        layer: a layer, a preset's name, or the path of a config.json.
        ep_size: the ranks that share the experts.
        fields: other arguments of `Regime`; they win over what the dispatcher sets.

    Raises:
        UsageError: no such engine or dispatcher (the message lists them), or a value out of range.
        UnsupportedError: moetune does not tune the kernels that this dispatcher feeds.
    """
    shape = layer if isinstance(layer, MoELayer) else layer_of(layer)
    found = dispatcher.resolve(
        name,
        shape,
        ep_size,
        fields.get("redundant_experts", 0),
        fields.get("attention_dp"),
        fields.get("tp_size", 1),
    )
    return Regime(**{"ep_size": ep_size, **found, **fields})
