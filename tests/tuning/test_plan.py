import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.inputs.presets import layer as layer_of
from moetune.spec.enums import DISTRIBUTION_VARIABLE, Precision
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.tuning.plan import WEIGHT_BITS, plan

SMALL = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)


def test_the_payloads_of_deepseek_r1_under_allgather_are_those_of_the_published_change():
    planned = plan("deepseek-r1", Regime(ep_size=4, attention_dp=True, dispatch="allgather", ladder="64"))
    payloads = {(way.activation, way.routing): (way.payload_bytes_per_token, way.ratio) for way in planned.wire}
    assert payloads["bf16", "logits"] == (15360, 1.0)
    assert payloads["fp4", "logits"] == (5056, 3.04)
    assert payloads["fp4", "packed_topk"] == (4064, 3.78)
    assert len(payloads) == 9
    assert planned.wire[0].tensors == {"hidden_states": 14336, "router_logits": 1024}


def test_a_grouped_router_is_simulated_and_sends_about_half_of_the_tokens_at_ep8():
    planned = plan("deepseek-r1", Regime(ep_size=8, attention_dp=True, layout="deduplicated", ladder="64"))
    assert planned.simulated
    assert 0.45 <= planned.hit_fraction <= 0.50
    assert not plan("qwen3-30b-a3b", Regime(ep_size=8, ladder="64"), device="cpu").simulated


def test_a_dense_bucket_is_computed_by_hand():
    regime = Regime(ep_size=4, tp_size=2, attention_dp=True, ladder="8")
    (bucket,) = plan(SMALL, regime, device="cpu").buckets
    assert (bucket.rows, bucket.tokens_per_rank, bucket.local_slots) == (8, 8, 32)
    assert (bucket.slots_per_expert, bucket.active_experts) == (8, 4)
    assert bucket.flops == 2 * 32 * 3 * 64 * 16
    assert bucket.weight_bytes == 4 * 3 * 64 * 16 * 2
    assert bucket.activation_bytes == 32 * (64 + 2 * 16 + 16 + 64) * 2
    assert bucket.tactics == 6
    assert bucket.excluded_tactics == {}


def test_biases_count_as_weights():
    regime = Regime(ep_size=4, ladder="8")
    biased = MoELayer(**{**dict(SMALL), "expert_bias": True})
    difference = plan(biased, regime).resident_bytes - plan(SMALL, regime).resident_bytes
    assert difference == 4 * 2 * (2 * 32 + 64)


@pytest.mark.parametrize("precision", Precision)
def test_the_weights_of_all_experts_follow_the_precision(precision):
    planned = plan(layer_of("mixtral-8x7b", precision), Regime(ladder="1"))
    assert planned.resident_bytes == 8 * 3 * 4096 * 14336 * WEIGHT_BITS[precision] / 8


def test_published_sizes_of_block_scaled_weights():
    # 128×128 blocks with an f32 scale; 16 values an e4m3 scale; 32 values an e8m0 scale
    values = 128 * 128
    assert values * WEIGHT_BITS[Precision.FP8_BLOCK] / 8 == values + 4
    assert values * WEIGHT_BITS[Precision.NVFP4] / 8 == values // 2 + values // 16
    assert values * WEIGHT_BITS[Precision.MXFP4] / 8 == values // 2 + values // 32


def test_a_backend_that_does_not_compute_the_layer_leaves_the_tactics_open():
    planned = plan("gpt-oss-120b", Regime(ep_size=64, attention_dp=True, ladder="64"), "torch")
    assert "mxfp4" in planned.tactics_unknown
    assert planned.buckets[0].tactics is None
    assert planned.buckets[0].local_slots == 64 * 2  # two experts a rank, fewer than top-k


def test_another_rank_of_equal_shards_sees_the_same_numbers_elsewhere():
    regime = Regime(ep_size=4, ladder="8")
    first, last = plan(SMALL, regime), plan(SMALL, regime, rank=3)
    assert (first.first_expert, last.first_expert, last.num_local_experts) == (0, 12, 4)
    assert first.buckets == last.buckets


def test_the_variable_gives_the_default_distribution_and_a_given_one_beats_it(monkeypatch):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "BALANCED")
    assert plan(SMALL, Regime(ladder="8")).regime.distribution == "balanced"
    assert plan(SMALL, Regime(ladder="8", distribution="random")).regime.distribution == "random"


@pytest.mark.parametrize(
    "given", [{"rank": 4}, {"backend": "nope"}, {"regime": Regime(ep_size=3)}, {"layer": "no-such-model"}]
)
def test_an_invalid_argument_is_a_usage_error(given):
    with pytest.raises(UsageError):
        plan(**{"layer": SMALL, "regime": Regime(ep_size=4), **given})


@given(
    ep_size=st.sampled_from([1, 2, 4, 16]),
    deployment=st.sampled_from(
        [(None, None), ("allgather", None), *(("alltoall", way) for way in ("packed", "deduplicated", "slot", "pool"))]
    ),
    grouped=st.booleans(),
    distribution=st.sampled_from(["random", "balanced"]),
)
@settings(max_examples=40)
def test_the_numbers_of_a_bucket_hold_together(ep_size, deployment, grouped, distribution):
    dispatch, layout = deployment
    regime = Regime(
        ep_size=ep_size, dispatch=dispatch, layout=layout, distribution=distribution, ladder="16,64,256", draws=1
    )
    routing = RoutingMethod(num_groups=4, top_k_groups=2) if grouped else RoutingMethod()
    planned = plan(MoELayer(**{**dict(SMALL), "routing": routing}), regime, device="cpu")
    assert [bucket.rows for bucket in planned.buckets] == list(regime.buckets)
    assert planned.regime == regime
    for bucket in planned.buckets:
        assert bucket.slots_per_expert * planned.num_local_experts == pytest.approx(bucket.local_slots)
        assert 0 < bucket.active_experts <= planned.num_local_experts + 1e-9
        assert bucket.active_experts <= bucket.local_slots + 1e-9
        assert bucket.weight_bytes <= planned.resident_bytes
        assert bucket.flops == round(2 * bucket.local_slots * 3 * 64 * 32)
        assert (bucket.received_bytes > 0) == (dispatch is not None and ep_size > 1)
    if dispatch is None:
        assert planned.wire == ()
    else:
        assert planned.wire[0].ratio == 1.0
        assert all(sum(way.tensors.values()) == way.payload_bytes_per_token for way in planned.wire)
        assert dispatch == "allgather" or all(way.routing != "logits" for way in planned.wire)


def test_an_expert_without_a_gate_has_two_matrices_in_bytes_and_flops():
    sizes = {"num_experts": 16, "top_k": 2, "hidden_size": 1024, "intermediate_size": 512}
    gated, plain = (MoELayer(**sizes, activation=activation) for activation in ("silu", "relu2"))
    for regime in (Regime(ladder="64"), Regime(tp_size=2, ladder="64")):
        three, two = plan(gated, regime), plan(plain, regime)
        assert three.resident_bytes * 2 == two.resident_bytes * 3
        assert three.buckets[0].flops * 2 == two.buckets[0].flops * 3
        per_slot = 2 * (1024 + 512 // regime.tp_size)
        narrower = 2 * 512 // regime.tp_size
        assert three.buckets[0].activation_bytes - two.buckets[0].activation_bytes == 128 * narrower
        assert two.buckets[0].activation_bytes == 128 * 2 * per_slot
