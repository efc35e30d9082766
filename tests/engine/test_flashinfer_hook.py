import threading
from types import SimpleNamespace

import pytest
import torch
from flashinfer.autotuner import AutoTuner, autotune
from flashinfer.autotuner.autotuner import AutoTuner as Stock
from stand_ins import FAST, FROM_LOGITS, MIDDLING, PACKED, TIMES_US, UNPACKED, Trtllm

import moetune
from moetune.engine.dummies import Dummies
from moetune.inputs import flashinfer_versions
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime

OPS = (
    ("trtllm_bf16_moe", (FROM_LOGITS, PACKED, UNPACKED)),
    ("trtllm_fp8_per_tensor_scale_moe", (FROM_LOGITS,)),
    ("trtllm_fp8_per_tensor_scale_routed_moe", (PACKED, UNPACKED)),
    ("trtllm_fp8_per_channel_scale_moe", (FROM_LOGITS, PACKED)),
    ("trtllm_fp8_block_scale_moe", (FROM_LOGITS, PACKED, UNPACKED)),
    ("trtllm_fp4_block_scale_moe", (FROM_LOGITS, PACKED, UNPACKED)),
    ("trtllm_mxint4_block_scale_moe", (FROM_LOGITS, PACKED)),
)
BUCKETS = (1, 2, 4, 8)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in OPS for mode in modes])
def test_every_tactic_sees_exactly_the_regimes_histogram(tuner, layer, regime, name, mode):
    op = Trtllm(layer, regime, op=f"flashinfer::{name}", mode=mode, says_mode="per_channel" not in name)
    with moetune.warmup(layer, regime, rank=1):
        op()
    swept = op.runner.seen[: 3 * len(BUCKETS)]
    for tactic, inputs in swept:
        rows = op.runner.rows(inputs)
        assert op.load(inputs) == moetune.realize(layer, regime, rows, rank=1).load.tolist(), (tactic, rows)
    unseen = {
        rows: [moetune.realize(layer, regime, rows, rank=1, draw=draw).load.tolist() for draw in range(2, 6)]
        for rows in BUCKETS
    }
    for _, inputs in op.runner.seen[len(swept) :]:
        rows, load = op.runner.rows(inputs), op.load(inputs)
        assert load in unseen[rows] or max(load) > max(unseen[rows][0]), "neither a draw nor a stressed one"
    assert {op.runner.rows(inputs) for _, inputs in op.runner.seen} == set(BUCKETS)


@pytest.mark.parametrize("mode", [FROM_LOGITS, PACKED])
def test_an_op_is_compared_on_draws_of_every_distribution(tuner, layer, mode):
    fields = {"ep_size": 4, "dispatch": "allgather", "ladder": "hybrid", "tune_max_num_tokens": 8, "draws": 4}
    regime = Regime(**fields, also=("zipf:2=0.25",))
    op = Trtllm(layer, regime, mode=mode)
    with moetune.warmup(layer, regime, rank=1) as seen:
        op()
    assert {rows for _, rows in seen.tuned} == set(BUCKETS)
    drawn = [(op.runner.rows(inputs), tuple(op.load(inputs))) for _, inputs in op.runner.seen[3 * len(BUCKETS) :]]
    for part in regime.parts:
        assert part.draws == 2
        for number in (2, 3):
            load = moetune.realize(layer, part, 8, rank=1, draw=number).load.tolist()
            assert (8, tuple(load)) in drawn, (part.distribution, number)
    sweep = {tuple(op.load(inputs)) for _, inputs in op.runner.seen[: 3 * len(BUCKETS)] if op.runner.rows(inputs) == 8}
    assert sweep == {tuple(moetune.realize(layer, Regime(**fields), 8, rank=1).load.tolist())}


@pytest.mark.parametrize(("ladder", "typical"), [("hybrid", 471), ("pow2", 512)])
def test_odd_draws_have_the_typical_rows_of_a_bucket_if_the_ops_tensors_hold_them(ladder, typical):
    """64 tokens of each of 32 ranks produce 471 rows. TensorRT-LLM maps 942 rows to 512, more than the tensors hold."""
    large = MoELayer(num_experts=128, top_k=8, hidden_size=64, intermediate_size=64)
    regime = Regime(ep_size=32, layout="deduplicated", ladder=ladder)
    dummies = Dummies(large, regime, SimpleNamespace(rank=1), None)
    assert dummies.typical_rows(512) == typical
    for number, draw in enumerate(dummies.draws(512, range(4), "final")):
        rows, routing = (typical if number % 2 else 512), draw.routing
        assert draw.rows == rows
        assert int((routing.topk_ids >= 0).any(1).sum()) == rows
        assert routing.topk_ids.shape == (512, 8)
        assert torch.equal(routing.load, moetune.realize(large, regime, rows, rank=1, draw=number).load)


@pytest.mark.parametrize("mode", [FROM_LOGITS, PACKED, UNPACKED])
@pytest.mark.parametrize("distribution", ["random", "balanced"])
@pytest.mark.parametrize(
    "deployment",
    [
        {"attention_dp": False},
        {"dispatch": "allgather"},
        {"layout": "packed"},
        {"layout": "deduplicated"},
        {"layout": "slot"},
        {"layout": "pool"},
    ],
    ids=lambda fields: str(next(iter(fields.values()))),
)
def test_every_dispatch_reaches_the_kernel(tuner, layer, mode, distribution, deployment):
    regime = Regime(ep_size=4, distribution=distribution, ladder="hybrid", tune_max_num_tokens=8, **deployment)
    op = Trtllm(layer, regime, mode=mode)
    with moetune.warmup(layer, regime) as seen:
        op()
    buckets = [rows for rows in BUCKETS if deployment.get("layout") != "pool" or rows % 4 == 0]
    assert {rows for _, rows in seen.tuned} == set(buckets)
    assert {rows for _, rows in seen.missed} == set(BUCKETS) - set(buckets)
    for _, inputs in op.runner.seen[: 3 * len(buckets)]:
        rows = op.runner.rows(inputs)
        if rows in buckets:
            assert op.load(inputs) == moetune.realize(layer, regime, rows, rank=1).load.tolist()


def test_no_op_reads_expert_major_rows(tuner, layer):
    regime = Regime(ep_size=4, layout="batched", ladder=[8])
    op = Trtllm(layer, regime)
    with moetune.warmup(layer, regime) as seen:
        op()
    assert not seen.tuned | seen.served | seen.missed


def test_placeholders_are_not_written(tuner, layer, regime):
    for mode, untouched in ((FROM_LOGITS, (2, 3)), (PACKED, (3,))):
        op = Trtllm(layer, regime, mode=mode)
        with moetune.warmup(layer, regime):
            op()
        for _, inputs in op.runner.seen:
            for at in untouched:
                assert (inputs[at] == 7).all(), "the tuner's own filling"


def test_unpacked_weights_come_with_their_ids(trtllm, layer, regime):
    trtllm.mode = UNPACKED
    with moetune.warmup(layer, regime):
        trtllm()
    _, inputs = trtllm.runner.seen[0]
    routing = moetune.realize(layer, regime, trtllm.runner.rows(inputs), rank=1)
    assert torch.equal(inputs[2], routing.topk_ids)
    assert inputs[3].dtype == torch.bfloat16
    assert torch.equal(inputs[3], routing.topk_weights.bfloat16())


def test_logits_produce_the_load_through_a_group_limited_router_with_a_bias(tuner, layer, regime):
    grouped = layer.model_copy(
        update={
            "routing": RoutingMethod(scoring="sigmoid", bias=True, num_groups=4, top_k_groups=2),
        }
    )
    op = Trtllm(grouped, regime, mode=FROM_LOGITS, bias=torch.linspace(-0.3, 0.3, 16))
    with moetune.warmup(grouped, regime) as seen:
        op()
    assert len(seen.tuned) == len(BUCKETS)
    for _, inputs in op.runner.seen[:12]:
        rows = op.runner.rows(inputs)
        assert op.load(inputs) == moetune.realize(grouped, regime, rows, rank=1).load.tolist()


def test_an_op_whose_logits_cannot_produce_the_load_is_left_to_flashinfer(tuner, layer, regime, caplog):
    biased = layer.model_copy(update={"routing": RoutingMethod(scoring="sigmoid", bias=True)})
    op = Trtllm(biased, regime, mode=FROM_LOGITS, bias=torch.linspace(0, 40, 16))
    with moetune.warmup(biased, regime) as seen:
        assert op() == FAST, "FlashInfer's own choice"
    assert not seen.tuned
    assert len(seen.missed) == len(BUCKETS)
    assert "produce this load: a group limit or a routing bias rules it out" in caplog.text


def test_a_hook_that_was_there_still_runs_first(tuner, layer, regime):
    marked = []

    def hook(tensors):
        marked.append(tensors[2].clone())
        tensors[5] = torch.full_like(tensors[5], 42)
        tensors[2] = torch.zeros_like(tensors[2])
        return tensors

    op = Trtllm(layer, regime, hook=hook)
    with moetune.warmup(layer, regime):
        op()
    assert all((ids == 7).all() for ids in marked), "it saw the tuner's tensors"
    for _, inputs in op.runner.seen:
        assert (inputs[5] == 42).all(), "what it did stays"
        assert sum(op.load(inputs)) == 2 * op.runner.rows(inputs), "but the routing is the regime's"


def test_another_layers_op_is_tuned_as_flashinfer_does_it(tuner, layer, regime):
    other = Trtllm(layer.model_copy(update={"num_experts": 20}), Regime(ep_size=4))
    gemm = Trtllm(layer, regime, op="flashinfer::some_gemm")
    elsewhere = Trtllm(layer, regime, rank=2)
    with moetune.warmup(layer, regime, rank=1) as seen:
        assert [op() for op in (other, gemm, elsewhere)] == [FAST] * 3
    for op in (other, gemm, elsewhere):
        assert all((inputs[2] == 7).all() for _, inputs in op.runner.seen)
    assert not seen.tuned | seen.served | seen.missed


def test_a_nested_warmup_has_its_own_question_until_it_ends(tuner, layer, regime):
    pure_ep = Regime(ep_size=4, draws=4, ladder="hybrid", tune_max_num_tokens=8)
    op, inner, again = (Trtllm(layer, regime) for _ in range(3))
    with moetune.warmup(layer, regime):
        op()
        with moetune.warmup(layer, pure_ep) as nested:
            inner()
        again()
    assert len(nested.tuned) == len(BUCKETS), "what the outer one placed is no answer to another question"
    for _, inputs in inner.runner.seen[:12]:
        rows = inner.runner.rows(inputs)
        assert inner.load(inputs) == moetune.realize(layer, pure_ep, rows, rank=1).load.tolist()
    assert [tactic for tactic, _ in again.runner.seen] == [], "the outer one finds its answers in the store"


def test_a_second_thread_is_left_alone(tuner, layer, regime):
    op = Trtllm(layer, regime)
    with moetune.warmup(layer, regime) as seen:
        thread = threading.Thread(target=op)
        thread.start()
        thread.join()
    assert len(op.runner.seen) == 3 * len(BUCKETS), "FlashInfer's own sweep"
    assert all((inputs[2] == 7).all() for _, inputs in op.runner.seen)
    assert not seen.tuned | seen.served | seen.missed


def test_outside_flashinfer_is_as_it_was(tuner, layer, regime):
    with moetune.warmup(layer, regime):
        assert type(AutoTuner.get()) is not Stock
        with moetune.warmup(layer, regime):
            pass
        assert type(AutoTuner.get()) is not Stock
    assert type(AutoTuner.get()) is Stock
    assert AutoTuner.get() is tuner
    op = Trtllm(layer, regime)
    with autotune(True):
        op()
    assert all((inputs[2] == 7).all() for _, inputs in op.runner.seen)


def test_the_answer_stays_in_use_after_the_warmup(trtllm, layer, regime):
    with moetune.warmup(layer, regime):
        inside = trtllm(3)
    assert trtllm(3) == inside == tuple(FAST)


def test_skipped_ops_stay_skipped(trtllm, layer, regime):
    with moetune.warmup(layer, regime), autotune(True, skip_ops={trtllm.op}):
        assert trtllm() == -1
    assert not trtllm.runner.seen


def test_buckets_that_the_engine_overrides_are_the_ones_tuned(trtllm, layer, regime):
    with moetune.warmup(layer, regime) as seen, autotune(True, tuning_buckets=(2, 6)):
        trtllm(6)
    assert {rows for _, rows in seen.tuned} == {2, 6}


def test_an_unknown_version_warns_and_is_left_alone(trtllm, layer, regime, monkeypatch, caplog):
    monkeypatch.setattr(flashinfer_versions, "version", lambda: "0.9.0")
    with moetune.warmup(layer, regime):
        assert type(AutoTuner.get()) is Stock
        assert trtllm() == FAST
    assert "does not know the tuner of flashinfer-python 0.9.0" in caplog.text
    assert all((inputs[2] == 7).all() for _, inputs in trtllm.runner.seen)


def test_a_tactic_within_the_margin_does_not_replace_the_default(tuner, layer, regime):
    close = {**TIMES_US, str(FAST): 98.0, str(MIDDLING): 99.0}
    op = Trtllm(layer, regime, times_us=close)
    with moetune.warmup(layer, regime):
        assert op() == -1


def test_a_failing_tactic_costs_itself_alone(tuner, layer, regime):
    lacking = {name: time for name, time in TIMES_US.items() if name != str(FAST)}
    op = Trtllm(layer, regime, times_us=lacking)
    with moetune.warmup(layer, regime):
        assert op() == tuple(MIDDLING)
