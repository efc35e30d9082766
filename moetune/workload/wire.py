"""The tensors and bytes that travel between ranks in one dispatch and one combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moetune.errors import UsageError
from moetune.quoting import quoted
from moetune.spec.enums import Dispatch
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.rank_law import slot_law, token_chances

WireActivation = Literal["bf16", "fp8", "fp4"]
WireRouting = Literal["logits", "topk", "packed_topk"]
WIRE_ACTIVATIONS: tuple[WireActivation, ...] = ("bf16", "fp8", "fp4")
WIRE_ROUTINGS: tuple[WireRouting, ...] = ("logits", "topk", "packed_topk")

_BYTES = {"bf16": 2, "fp8_e4m3": 1, "uint8": 1, "fp32": 4, "int32": 4}


@dataclass(frozen=True, slots=True)
class WireTensor:
    """One tensor that travels with each token: `elements` values of type `dtype`."""

    name: str
    dtype: str
    elements: int

    @property
    def num_bytes(self) -> int:
        """Bytes per token."""
        return self.elements * _BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Wire:
    """The data that travels when each rank sends `tokens` tokens.

    Attributes:
        tensors: the tensors that travel with one token; empty without a dispatch.
        payload_bytes_per_token: the bytes of `tensors`.
        dispatch_bytes: bytes that one rank receives from the others before its kernel runs.
        combine_bytes: bytes that one rank receives from the others after it: the results of its tokens.
    """

    dispatch: Dispatch
    activation: WireActivation
    routing: WireRouting
    tokens: int
    tensors: tuple[WireTensor, ...]
    payload_bytes_per_token: int
    dispatch_bytes: int
    combine_bytes: int


def wire(
    layer: MoELayer,
    regime: Regime,
    tokens: int,
    activation: WireActivation = "bf16",
    routing: WireRouting | None = None,
    rank: int | None = None,
) -> Wire:
    """Returns the data that `rank` receives when each of the ep ranks sends `tokens` tokens.

    Without a dispatch the results are all-reduced. An all-gather is followed by a reduce-scatter. With ring algorithms
    each of these two sends every rank (ep − 1)/ep of the whole buffer. An all-reduce is one of each (Patarasuk and
    Yuan, JPDC 69(2), 2009). In an all-to-all a rank receives a token once if one of its experts is chosen, and in the
    slot and batched layouts once for each local slot. Results return as bf16.

    Args:
        layer, regime: the deployment.
        tokens: tokens per rank.
        activation: the format in which hidden states travel.
        routing: the format in which the routing travels. The default is top-k ids and weights in an all-to-all, which
            needs the ids to address the tokens, and logits otherwise.
        rank: the receiving rank; by default the regime's.

    Raises:
        UsageError: `activation` or `routing` is unknown, `tokens` is negative, or logits would travel in an all-to-all.
    """
    if tokens < 0:
        raise UsageError(f"tokens must be at least 0, given {tokens}.")
    routing = routing or ("topk" if regime.dispatch == "alltoall" else "logits")
    if routing == "logits" and regime.dispatch == "alltoall":
        raise UsageError("Router logits cannot travel in an all-to-all.", "Use topk or packed_topk.")
    tensors = (*_activation_tensors(layer, activation), *_routing_tensors(layer, routing))
    payload = sum(tensor.num_bytes for tensor in tensors)
    output_bytes = layer.hidden_size * _BYTES["bf16"]
    others = regime.ep_size - 1
    match regime.dispatch:
        case "none":
            tensors, payload, received = (), 0, 0
            combined = round(2 * others * tokens * output_bytes / regime.ep_size)
        case "allgather":
            received, combined = others * tokens * payload, others * tokens * output_bytes
        case "alltoall":
            arriving, returning = _alltoall_copies(layer, regime, regime.rank if rank is None else rank)
            received, combined = round(arriving * tokens) * payload, round(returning * tokens) * output_bytes
    return Wire(
        dispatch=regime.dispatch,
        activation=activation,
        routing=routing,
        tokens=tokens,
        tensors=tensors,
        payload_bytes_per_token=payload,
        dispatch_bytes=received,
        combine_bytes=combined,
    )


def _alltoall_copies(layer: MoELayer, regime: Regime, rank: int) -> tuple[float, float]:
    """Returns, for one token per rank, the copies that `rank` receives and the results that return to it."""

    def copies_of_a_token(receiver: int) -> float:
        if regime.layout in ("slot", "batched"):
            return sum(token_chances(layer, regime, receiver))
        return slot_law(layer, regime, receiver).hit_fraction

    returning = sum(copies_of_a_token(other) for other in range(regime.ep_size) if other != rank)
    return (regime.ep_size - 1) * copies_of_a_token(rank), returning


def _activation_tensors(layer: MoELayer, activation: WireActivation) -> Sequence[WireTensor]:
    hidden = layer.hidden_size
    match activation:
        case "bf16":
            return [WireTensor("hidden_states", "bf16", hidden)]
        case "fp8":
            return [
                WireTensor("hidden_states", "fp8_e4m3", hidden),
                WireTensor("hidden_states_scale", "fp32", -(-hidden // 128)),
            ]
        case "fp4":
            return [
                WireTensor("hidden_states", "uint8", -(-hidden // 2)),
                WireTensor("hidden_states_scale", "fp8_e4m3", -(-hidden // 16)),
            ]
    raise UsageError(f"activation must be one of {', '.join(WIRE_ACTIVATIONS)}; given {quoted(activation)}.")


def _routing_tensors(layer: MoELayer, routing: WireRouting) -> Sequence[WireTensor]:
    match routing:
        case "logits":
            return [WireTensor("router_logits", "fp32", layer.num_experts)]
        case "topk":
            return [WireTensor("topk_ids", "int32", layer.top_k), WireTensor("topk_weights", "fp32", layer.top_k)]
        case "packed_topk":
            return [WireTensor("packed_topk", "int32", layer.top_k)]
    raise UsageError(f"routing must be one of {', '.join(WIRE_ROUTINGS)}; given {quoted(routing)}.")
