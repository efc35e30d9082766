import pytest
import torch

from moetune.dep_bench.payload import Format, joined, parted
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.wire import wire

ALLGATHER = Regime(ep_size=4, dispatch="allgather")
DEDUPLICATED = Regime(ep_size=4, layout="deduplicated")
LAYER = MoELayer(num_experts=8, top_k=2, hidden_size=32, intermediate_size=16)


def test_tensors_come_out_of_one_buffer_as_they_went_in():
    tensors = [torch.arange(12, dtype=torch.uint8).view(3, 4), torch.randn(3, 2), torch.arange(3).view(3, 1).int()]
    buffer = joined(tensors)
    assert buffer.dtype == torch.uint8
    assert buffer.shape == (3, 4 + 8 + 4)
    for before, after in zip(tensors, parted(buffer, tensors), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


@pytest.mark.parametrize("routing", ["topk", "packed_topk"])
def test_the_routing_comes_back_as_it_was(routing):
    form = Format.of(LAYER, ALLGATHER, "bf16", routing)
    ids, weights = torch.tensor([[3, -1], [7, 0]], dtype=torch.int32), torch.tensor([[0.5, 0.0], [0.25, 0.75]])
    found_ids, found_weights = form.unrouted(form.routed(ids, weights))
    assert found_ids.tolist() == ids.tolist()
    assert found_weights.tolist() == weights.tolist()


@pytest.mark.parametrize(
    ("activation", "routing", "times"), [("bf16", "logits", 1.0), ("fp4", "logits", 3.04), ("fp4", "packed_topk", 3.78)]
)
def test_the_payload_of_deepseek_r1_shrinks_as_planned(activation, routing, times):
    layer, tokens = preset("deepseek-r1"), 5
    form = Format.of(layer, ALLGATHER, activation, routing)
    x = torch.randn(tokens, layer.hidden_size, dtype=torch.bfloat16)
    logits = torch.randn(tokens, layer.num_experts)
    routed = form.routed(torch.zeros(tokens, layer.top_k).int(), torch.ones(tokens, layer.top_k))
    sent = form.hidden(x).nbytes + (logits if routing == "logits" else routed).nbytes
    planned = wire(layer, ALLGATHER, tokens, activation, routing)
    assert sent == tokens * planned.payload_bytes_per_token
    assert (2 * layer.hidden_size + 4 * layer.num_experts) * tokens / sent == pytest.approx(times, abs=0.005)


def test_the_routing_that_travels_is_that_of_the_plan_unless_it_is_given():
    assert Format.of(LAYER, ALLGATHER).routing == "logits"
    assert Format.of(LAYER, DEDUPLICATED).routing == "topk"
    one = [Format.of(LAYER, ALLGATHER, activation, "packed_topk").in_one_buffer for activation in ("bf16", "fp4")]
    assert one == [False, True]


def test_what_may_not_travel_is_refused():
    with pytest.raises(UsageError, match="Router logits cannot travel in an all-to-all"):
        Format.of(LAYER, DEDUPLICATED, "fp4", "logits")
    with pytest.raises(UnsupportedError, match=r"fp8_tensor layer cannot be quantized before they travel.*#54683"):
        Format.of(MoELayer(**{**LAYER.model_dump(), "precision": "fp8_tensor"}), ALLGATHER, "fp4")
    with pytest.raises(UnsupportedError, match="multiple of 16, given 24"):
        Format.of(LAYER.model_copy(update={"hidden_size": 24}), ALLGATHER, "fp4")
    with pytest.raises(UnsupportedError, match="no fp8 on the wire"):
        Format.of(LAYER, ALLGATHER, "fp8")
