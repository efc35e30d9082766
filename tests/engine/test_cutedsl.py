"""CuteDSL's ops in a warm-up: plain ids at a position that depends on the runner."""

import pytest
import torch
from flashinfer.autotuner import AutoTuner, DynamicTensorSpec, TunableRunner, TuningConfig
from flashinfer.fused_moe.utils import get_hybrid_num_tokens_buckets, make_hybrid_bucket_mapper
from stand_ins import _running

import moetune
from moetune.engine.stored import native_of, tactic_of

FAST = (128, ((128, 128), (1, 1), False), ((64, 128), (2, 1), None))


class CuteDslFusedMoERunner(TunableRunner):
    def __init__(self, layer, regime):
        self.num_experts, self.top_k = layer.num_experts, layer.top_k
        self.num_local_experts, self.local_expert_offset = 4, 4
        self.seen_cache: list[tuple[object, list[torch.Tensor]]] = []

    last_us = 100.0

    def get_valid_tactics(self, inputs, profile):
        return [FAST, (256, FAST[1], FAST[2])]

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        if not do_preparation:
            self.seen_cache.append((tactic, list(inputs)))
            type(self).last_us = 50.0 if tactic == FAST else 100.0
            _running.append(self)


def choose(runner, layer, at, op, rows=8):
    """The tuner's choice for an op whose ids are input `at`; x is uint8, as FP4 is."""
    inputs = [torch.zeros(rows, layer.hidden_size // 2, dtype=torch.uint8)]
    inputs += [torch.zeros(rows, 2, dtype=torch.uint8)] * (at - 1)
    inputs += [torch.zeros(rows, layer.top_k, dtype=torch.int32), torch.zeros(rows, layer.top_k)]

    def balanced(tensors):
        tensors[at] = torch.zeros_like(tensors[at])
        return tensors

    every = tuple(range(len(inputs)))
    spec = DynamicTensorSpec(every, (0,) * len(every), get_hybrid_num_tokens_buckets(8), make_hybrid_bucket_mapper(8))
    zeros = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
    config = TuningConfig(
        dynamic_tensor_specs=(spec,),
        tensor_initializers=tuple((number, zeros) for number in every),
        inputs_pre_hook=balanced,
    )
    return AutoTuner.get().choose_one(op, [runner], config, inputs)[1]


@pytest.mark.parametrize(
    ("op", "at"),
    [
        ("CuteDslFusedMoE::run_moe_sm90::Swiglu", 1),
        ("CuteDslMoEWrapper::run::w4a4::Swiglu", 2),
        ("CuteDslFusedMoE::run_moe_w4a16::Swiglu", 1),
    ],
)
def test_the_ids_that_a_tactic_sees_have_the_regimes_histogram(tuner, layer, regime, op, at):
    runner = CuteDslFusedMoERunner(layer, regime)
    with moetune.warmup(layer, regime, rank=1) as seen:
        assert choose(runner, layer, at, op) == FAST
    assert seen.tuned == {("flashinfer-cutedsl", rows) for rows in (1, 2, 4, 8)}
    for _, inputs in runner.seen_cache[:8]:
        expected = moetune.realize(layer, regime, len(inputs[0]), rank=1)
        assert torch.equal(inputs[at], expected.topk_ids)


def test_nested_tactics_are_stored_and_come_back(tuner, layer, regime, monkeypatch):
    with moetune.warmup(layer, regime):
        choose(CuteDslFusedMoERunner(layer, regime), layer, 2, "CuteDslMoEWrapper::run::w4a4::Swiglu")
    monkeypatch.setattr(AutoTuner, "_instance", None)
    again = CuteDslFusedMoERunner(layer, regime)
    with moetune.warmup(layer, regime) as seen:
        assert choose(again, layer, 2, "CuteDslMoEWrapper::run::w4a4::Swiglu") == FAST
    assert len(seen.served) == 4
    assert not again.seen_cache


@pytest.mark.parametrize("native", [-1, (8, 3), FAST, 17])
def test_a_tactic_survives_the_store(native):
    assert native_of(tactic_of(native)) == native
