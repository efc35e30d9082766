"""`plan`: what each bucket's kernel will see, move and compute, and what travels, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
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
"""Bits of one weight, its share of the block scales and zero points included; groups are of 128 where they vary."""
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
"""Bits of one value that enters a GEMM, its share of the block scales included; what leaves one is 16 bits wide."""


class BucketPlan(FrozenModel):
    """What one rank's kernel sees in one bucket, on average over draws.

    `met_rows` enter the kernel for `tokens_per_rank` tokens of each rank. Where no number of tokens brings just the
    `rows` by which the bucket is looked up, they are others; half the dummies have these. `local_slots` of their slots
    are the rank's, `slots_per_expert` on each of its experts, of which `active_experts` have any.

    `received_bytes` and `combine_bytes` reach the rank from the others, for bf16 activations and the first routing of
    `Plan.wire`, at `max(1, round(tokens_per_rank))` tokens. `weight_bytes`: the weights of the active experts.
    `activation_bytes`: what both GEMMs read and write, S·(H + 2·I/tp) and S·(I/tp + H) values for S local slots.
    `flops`: 2·S·3·H·I/tp. `tactics`: how many would be tried, None where `Plan.tactics_unknown` says why;
    `excluded_tactics`: those left out, with the reasons.
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
    """One way in which a token can travel: its activation, its routing, and the bytes of every tensor.

    `ratio`: how many times smaller than the first way of the plan (bf16 activations), to two decimals.
    """

    activation: Literal["bf16", "fp8", "fp4"]
    routing: Literal["logits", "topk", "packed_topk"]
    payload_bytes_per_token: int
    ratio: float
    tensors: dict[str, int]


class Plan(FrozenModel):
    """The plan of one rank. `buckets` ascend; `skipped_buckets` are those that a pool cannot have; `wire` is empty
    where nothing is dispatched. `regime` is the one that `tune` would measure: with the rank that it would take.

    `simulated`: whether the law behind the loads comes from the layer's own router on seeded logits, because it is
    grouped; else it is in closed form. `hit_fraction`: the chance that a token has something for this rank.
    `resident_bytes`: the weights of all its experts.

    The command line fills in the rest: `kernels`, the stored `profile` that is nearest, and `next_command`, what to run
    next; None where there is nothing to run.
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
    kernels: Kernels | None = None
    profile: NearestProfile | None = None
    next_command: str | None = None


def plan(
    layer: MoELayer | str,
    regime: Regime,
    backend: str | Backend = "auto",
    device: str | None = None,
    *,
    rank: RankWord | int | None = None,
) -> Plan:
    """What `rank`'s kernel will see in each bucket of `regime`, and what would be tried. Measures nothing.

    Args:
        layer: a layer, a preset's name, or a path to a Hugging Face config.json.
        regime: how one rank meets the layer. Where no distribution was given at its construction,
            `TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION` gives it.
        backend: whose tactics are counted, as `tune` takes it.
        device: the torch device they are counted for; `cuda` where there is one, else `cpu`, by default.
        rank: of 0 … ep_size − 1, or `mean` or `fullest`; by default the one that `tune` would measure.

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
    expectations = {
        rows: expect(layer, regime, typical_rows(layer, regime, rows, rank), rank) for rows in regime.buckets
    }
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
    )


def _candidates(
    layer: MoELayer, regime: Regime, backend: Backend, device: str | None
) -> tuple[dict[int, Candidates], str]:
    """Each bucket's candidates; none, and why, where the backend cannot tell."""
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
    """One expert's weights on this rank, scales and biases (16 bits each) included."""
    bits = layer.weights_per_expert // regime.tp_size * WEIGHT_BITS[layer.precision]
    if layer.expert_bias:
        bits += 16 * (layer.activation.halves * regime.intermediate_size(layer) + layer.hidden_size)
    return float(bits / 8)


def _payloads(layer: MoELayer, regime: Regime) -> tuple[Payload, ...]:
    """Every activation with every routing that can travel in the regime's dispatch, the plainest first."""
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
