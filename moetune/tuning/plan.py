"""Defines `plan`, which computes the load, traffic, bytes and operations of each bucket without a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from moetune.recordings.recording import known
from moetune.spec.achieved import AchievedSkew
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.recording import RecordingSummary
from moetune.spec.regime import Regime
from moetune.tuning.outlook import Kernels, NearestProfile
from moetune.tuning.question import resolved

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Candidates
    from moetune.spec.enums import RankWord
    from moetune.workload.dispatch import Expectation

WEIGHT_BITS: Mapping[Precision, Fraction] = {
    Precision.FP32: Fraction(32),
    Precision.BF16: Fraction(16),
    Precision.FP16: Fraction(16),
    Precision.FP8_BLOCK: 8 + Fraction(32, 128 * 128),
    Precision.FP8_TENSOR: Fraction(8),
    Precision.NVFP4: 4 + Fraction(8, 16),
    Precision.MXFP4: 4 + Fraction(8, 32),
    Precision.MXINT4: 4 + Fraction(16, 32),
    Precision.FP8_BLOCK_64: 8 + Fraction(32, 64 * 64),
    Precision.FP8_CHANNEL: Fraction(8),
    Precision.MXFP8: 8 + Fraction(8, 32),
    Precision.NVFP4_A16: 4 + Fraction(8, 16),
    Precision.INT4_G128: 4 + Fraction(16, 128),
    Precision.AWQ_INT4: 4 + Fraction(16 + 4, 128),
    Precision.GPTQ_INT4: 4 + Fraction(16 + 4, 128),
    Precision.GPTQ_INT8: 8 + Fraction(16 + 8, 128),
    Precision.BNB_4BIT: 4 + Fraction(32, 64),
    Precision.BNB_8BIT: Fraction(8),
    Precision.INT8_W8A16: Fraction(8),
    Precision.INT8_W8A8: Fraction(8),
    Precision.W4A8: 4 + Fraction(16, 128),
}
"""Bits of one weight, with its share of block scales and zero points. Group sizes that vary are taken as 128."""
INPUT_BITS: Mapping[Precision, Fraction] = {
    Precision.FP32: Fraction(32),
    Precision.BF16: Fraction(16),
    Precision.FP16: Fraction(16),
    Precision.FP8_BLOCK: 8 + Fraction(32, 128),
    Precision.FP8_TENSOR: Fraction(8),
    Precision.NVFP4: 4 + Fraction(8, 16),
    Precision.MXFP4: Fraction(16),
    Precision.MXINT4: Fraction(16),
    Precision.FP8_BLOCK_64: 8 + Fraction(32, 64),
    Precision.FP8_CHANNEL: Fraction(8),
    Precision.MXFP8: 8 + Fraction(8, 32),
    Precision.NVFP4_A16: Fraction(16),
    Precision.INT4_G128: Fraction(16),
    Precision.AWQ_INT4: Fraction(16),
    Precision.GPTQ_INT4: Fraction(16),
    Precision.GPTQ_INT8: Fraction(16),
    Precision.BNB_4BIT: Fraction(16),
    Precision.BNB_8BIT: Fraction(8),
    Precision.INT8_W8A16: Fraction(16),
    Precision.INT8_W8A8: Fraction(8),
    Precision.W4A8: Fraction(8),
}
"""Bits of one value that enters a GEMM, with its share of block scales. Values that leave a GEMM have 16 bits."""


class BucketPlan(FrozenModel):
    """The expected load of one rank's kernel in one bucket, on average over draws.

    Attributes:
        rows: the bucket.
        met_rows: the typical rows: `rows`, or the most likely row count that maps to it. All loads are for these rows.
        tokens_per_rank: the tokens of each rank that produce `met_rows`.
        local_slots: the slots of local experts.
        slots_per_expert: `local_slots` over the number of local experts.
        active_experts: the local experts that have a slot.
        received_bytes: the bytes that the dispatch sends to this rank, for bf16 activations and the first routing of
            `Plan.wire`, at `max(1, round(tokens_per_rank))` tokens.
        combine_bytes: the bytes that the combine sends back to this rank: the results of its tokens.
        weight_bytes: the weights of the active experts.
        activation_bytes: what both GEMMs read and write: S·(H + 2·I/tp) and S·(I/tp + H) values for S local slots.
        flops: 2·S·3·H·I/tp.
        tactics: the number of candidates; None if `Plan.tactics_unknown` says why.
        excluded_tactics: the excluded tactics, each with the reason.
    """

    rows: int
    met_rows: int
    tokens_per_rank: float
    local_slots: float
    slots_per_expert: float
    active_experts: float
    received_bytes: int
    combine_bytes: int
    weight_bytes: int
    activation_bytes: int
    flops: int
    tactics: int | None
    excluded_tactics: dict[str, str] = {}


class Payload(FrozenModel):
    """The bytes of one token for one format of its activation and one of its routing.

    Attributes:
        activation: the format of the activation.
        routing: the format of the routing.
        payload_bytes_per_token: the bytes of all tensors.
        ratio: how many times smaller it is than the plan's first entry, which has bf16 activations, to two decimals.
        tensors: the bytes of each tensor.
    """

    activation: Literal["bf16", "fp8", "fp4"]
    routing: Literal["logits", "topk", "packed_topk"]
    payload_bytes_per_token: int
    ratio: float
    tensors: dict[str, int]


class Plan(FrozenModel):
    """The plan of one rank.

    Attributes:
        layer: the layer.
        regime: the regime that `tune` would measure, with the rank that it would choose.
        rank: the rank of the plan.
        first_expert: the rank's first physical expert.
        num_local_experts: how many physical experts it holds.
        resident_bytes: the weights of all local experts.
        hit_fraction: the chance that a token has a slot on this rank.
        simulated: whether the loads come from the layer's router on seeded logits, because it has groups. Otherwise
            they are in closed form.
        backend: the backend for which tactics are counted.
        tactics_unknown: why they cannot be counted here; empty if they can.
        skipped_buckets: the ladder's buckets that no pool maps to.
        buckets: the plan of each bucket, ascending.
        wire: the formats in which a token can travel; empty if nothing is dispatched.
        skew: the asked and the achieved skew; None if the distribution is not skewed. Of a recording both are its own.
            If the regime has several distributions, this and all loads are of the main one.
        recording: the recording that takes the router's place; None for other distributions.
        kernels: the kernels that run the experts. Only the command line sets this and the next three fields.
        profile: the nearest stored profile.
        profile_unknown: why none can be looked up here; empty if that is possible.
        next_command: the command to run next; None if there is none.
    """

    schema_version: Literal[1] = 1
    layer: MoELayer
    regime: Regime
    rank: int
    first_expert: int
    num_local_experts: int
    resident_bytes: int
    hit_fraction: float
    simulated: bool
    backend: str
    tactics_unknown: str = ""
    skipped_buckets: tuple[int, ...]
    buckets: tuple[BucketPlan, ...]
    wire: tuple[Payload, ...]
    skew: AchievedSkew | None = None
    recording: RecordingSummary | None = None
    kernels: Kernels | None = None
    profile: NearestProfile | None = None
    profile_unknown: str = ""
    next_command: str | None = None


def plan(
    layer: MoELayer | str,
    regime: Regime,
    backend: str | Backend = "auto",
    device: str | None = None,
    *,
    rank: RankWord | int | None = None,
) -> Plan:
    """Returns the expected load of a rank's kernel in each bucket, and the number of candidates. Measures nothing.

    Args:
        layer: a layer, a preset's name, or a path to a Hugging Face config.json.
        regime: the deployment. If it was constructed without a distribution,
            `TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION` sets it.
        backend: the backend for which tactics are counted, as in `tune`.
        device: the torch device for which tactics are counted; by default `cuda` if there is one, else `cpu`.
        rank: 0 … ep_size − 1, `mean` or `fullest`; by default the rank that `tune` would measure.

    Raises:
        UsageError: the regime does not fit the layer, an unknown name, or no such rank.
    """
    from moetune.backends.registry import chosen
    from moetune.workload.dispatch import expect
    from moetune.workload.draws import typical_rows

    layer, regime = resolved(layer, regime, rank)
    shard = regime.shard(layer, rank if isinstance(rank, int) else None)
    rank = shard.rank
    kernels = chosen(backend, layer, regime)
    main = regime.parts[0]
    expectations = {rows: expect(layer, main, typical_rows(layer, main, rows, rank), rank) for rows in regime.buckets}
    candidates, unknown = _candidates(layer, regime, kernels, device)
    typical = next(iter(expectations.values()))
    return Plan(
        layer=layer,
        regime=regime,
        rank=rank,
        first_expert=shard.first,
        num_local_experts=shard.num_local,
        resident_bytes=round(shard.num_local * _expert_bytes(layer, regime)),
        hit_fraction=typical.hit_fraction,
        simulated=typical.simulated,
        backend=kernels.name,
        tactics_unknown=unknown,
        skipped_buckets=regime.skipped_buckets,
        buckets=tuple(
            _bucket(layer, regime, rank, rows, expected, candidates) for rows, expected in expectations.items()
        ),
        wire=_payloads(layer, regime),
        skew=_skew(layer, main, list(expectations.values())[-1].rows, rank),
        recording=None if (found := known(regime)) is None else found.summary,
    )


def bucket_load(layer: MoELayer, regime: Regime, rows: int) -> BucketPlan:
    """Returns the expected load of the regime's rank in `rows` rows, without candidates.

    Args:
        layer: the layer.
        regime: the deployment.
        rows: rows in the kernel; they need not be a bucket of the ladder.

    Raises:
        UsageError: as `workload.dispatch.expect`.
    """
    from moetune.workload.dispatch import expect

    return _bucket(layer, regime, regime.shard(layer).rank, rows, expect(layer, regime, rows), {})


def _skew(layer: MoELayer, regime: Regime, rows: int, rank: int) -> AchievedSkew | None:
    if regime.skew is None:
        return None
    from moetune.workload.achieved import achieved

    return achieved(layer, regime, rows, rank)


def _candidates(
    layer: MoELayer, regime: Regime, backend: Backend, device: str | None
) -> tuple[dict[int, Candidates], str]:
    """Returns the candidates of each bucket, or no candidates and the reason if the backend cannot list them."""
    from moetune.measure.probe import device_for

    if reason := backend.unsupported(layer, regime):
        return {}, f"{backend.name} does not compute this layer: {reason}"
    if obstacle := backend.unavailable():
        return {}, f"{backend.name} cannot run here: {obstacle[0]}"
    device = device_for(device)
    return {rows: backend.candidates(layer, regime, rows, device) for rows in regime.buckets}, ""


def _bucket(
    layer: MoELayer,
    regime: Regime,
    rank: int,
    rows: int,
    expected: Expectation,
    candidates: Mapping[int, Candidates],
) -> BucketPlan:
    from moetune.workload.wire import wire

    travels = wire(layer, regime, max(1, round(expected.tokens)), rank=rank)
    hidden, intermediate = layer.hidden_size, regime.intermediate_size(layer)
    input_bits = INPUT_BITS[layer.precision]
    output_bits = 32 if layer.precision is Precision.FP32 else 16
    slot_bits = input_bits * (hidden + intermediate) + output_bits * (layer.activation.halves * intermediate + hidden)
    found = candidates.get(rows)
    return BucketPlan(
        rows=rows,
        met_rows=expected.rows,
        tokens_per_rank=expected.tokens,
        local_slots=expected.local_slots,
        slots_per_expert=expected.slots_per_expert,
        active_experts=expected.active_experts,
        received_bytes=travels.dispatch_bytes,
        combine_bytes=travels.combine_bytes,
        weight_bytes=round(expected.active_experts * _expert_bytes(layer, regime)),
        activation_bytes=round(expected.local_slots * float(slot_bits / 8)),
        flops=round(2 * expected.local_slots * (layer.weights_per_expert // regime.tp_size)),
        tactics=None if found is None else len(found.tactics),
        excluded_tactics={str(tactic): reason for tactic, reason in found.excluded.items()} if found else {},
    )


def _expert_bytes(layer: MoELayer, regime: Regime) -> float:
    """Returns the bytes of one expert's weights on this rank, with scales and with biases of 16 bits each."""
    bits = layer.weights_per_expert // regime.tp_size * WEIGHT_BITS[layer.precision]
    if layer.expert_bias:
        bits += 16 * (layer.activation.halves * regime.intermediate_size(layer) + layer.hidden_size)
    return float(bits / 8)


def _payloads(layer: MoELayer, regime: Regime) -> tuple[Payload, ...]:
    """Returns every format of activation with every format of routing that the regime's dispatch can carry."""
    from moetune.workload.wire import WIRE_ACTIVATIONS, WIRE_ROUTINGS, wire

    if regime.dispatch == "none":
        return ()
    routings = [way for way in WIRE_ROUTINGS if regime.dispatch == "allgather" or way != "logits"]
    ways = [wire(layer, regime, 1, activation, routing) for activation in WIRE_ACTIVATIONS for routing in routings]
    return tuple(
        Payload(
            activation=way.activation,
            routing=way.routing,
            payload_bytes_per_token=way.payload_bytes_per_token,
            ratio=round(ways[0].payload_bytes_per_token / way.payload_bytes_per_token, 2),
            tensors={tensor.name: tensor.num_bytes for tensor in way.tensors},
        )
        for way in ways
    )
