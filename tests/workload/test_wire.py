"""Bytes on the wire against sums by hand."""

import pytest
from sampling_cases import VIEWS, deepseek_r1, moe, regime_of

from moetune.errors import UsageError
from moetune.workload.law import local_slot_law
from moetune.workload.wire import WireActivation, WireRouting, wire


@pytest.mark.parametrize(
    ("activation", "routing", "payload"),
    [
        ("bf16", "logits", 15360),
        ("fp8", "logits", 7168 + 4 * 56 + 1024),
        ("fp4", "logits", 5056),
        ("fp4", "topk", 3584 + 448 + 64),
        ("fp4", "packed_topk", 4064),
    ],
)
def test_payloads_of_deepseek_r1(activation: WireActivation, routing: WireRouting, payload: int) -> None:
    sent = wire(deepseek_r1(), regime_of("allgather", 4), 100, activation, routing)
    assert sent.payload_bytes_per_token == payload == sum(tensor.num_bytes for tensor in sent.tensors)
    assert type(sent.payload_bytes_per_token) is int
    assert sent.dispatch_bytes == 3 * 100 * payload
    assert sent.combine_bytes == 3 * 100 * 7168 * 2


def test_without_a_dispatch_only_the_all_reduce_travels() -> None:
    sent = wire(deepseek_r1(), regime_of("none", 4), 100)
    assert (sent.tensors, sent.payload_bytes_per_token, sent.dispatch_bytes) == ((), 0, 0)
    assert sent.combine_bytes == 2 * 3 * 100 * 7168 * 2 // 4


@pytest.mark.parametrize("view", ["packed", "deduplicated", "pool"])
def test_an_all_to_all_sends_a_token_once_to_each_rank_that_it_hits(view: str) -> None:
    layer, regime = moe(256, 8), regime_of(view, 8)
    sent = wire(layer, regime, 1000, "fp4", "packed_topk")
    copies = round(7 * 1000 * local_slot_law(layer, regime.shard(layer)).hit_fraction)
    assert sent.dispatch_bytes == copies * 4064
    assert sent.combine_bytes == copies * 7168 * 2
    assert type(sent.dispatch_bytes) is type(sent.combine_bytes) is int


def test_in_the_slot_layout_every_slot_of_another_rank_travels() -> None:
    sent = wire(moe(256, 8), regime_of("slot", 8), 1000)
    assert sent.routing == "topk"
    assert sent.dispatch_bytes == 7 * 1000 * (7168 * 2 + 64)
    assert sent.combine_bytes == 7 * 1000 * 7168 * 2


def test_one_rank_receives_nothing() -> None:
    for view in VIEWS:
        sent = wire(moe(64, 4), regime_of(view, 1), 64)
        assert (sent.dispatch_bytes, sent.combine_bytes) == (0, 0)


def test_what_cannot_travel_is_a_usage_error() -> None:
    layer = moe(64, 4)
    with pytest.raises(UsageError, match="logits cannot travel in an all-to-all"):
        wire(layer, regime_of("packed", 4), 1, "bf16", "logits")
    with pytest.raises(UsageError, match="bf16, fp8, fp4"):
        wire(layer, regime_of("allgather", 4), 1, "int3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="logits, topk, packed_topk"):
        wire(layer, regime_of("allgather", 4), 1, "bf16", "post")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="tokens"):
        wire(layer, regime_of("allgather", 4), -1)
