"""`cutlass_fused_moe` in a warm-up: both of its tuner calls are answered by moetune's own timing."""

import importlib

import pytest
import torch
from flashinfer.autotuner import AutoTuner, DynamicTensorSpec, TunableRunner, TuningConfig
from flashinfer.fused_moe.utils import get_hybrid_num_tokens_buckets, make_hybrid_bucket_mapper

import moetune
from moetune.errors import UnsupportedError
from moetune.spec.environment import Environment
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile
from moetune.tuning.events import BucketChosen

BUCKETS = (1, 2, 4, 8)


class MoERunner(TunableRunner):
    """The CUTLASS runner as the tuner sees it."""

    use_deepseek_fp8_block_scale = use_w4_group_scaling = min_latency_mode = False
    use_fused_finalize = True

    def __init__(self, layer, regime, rank=1, weight_dtype=torch.bfloat16):
        self.weight_dtype = weight_dtype
        self.top_k, self.ep_size, self.ep_rank, self.tp_size = layer.top_k, regime.ep_size, rank, regime.tp_size
        self.seen_cache: list[object] = []

    last_us = 1.0

    def get_valid_tactics(self, inputs, profile):
        return [0, 1]

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        self.seen_cache.append(tactic)


def call(runner, layer, regime, rows=8, maximum=8):
    """The tactics of both GEMMs, with the tuner called as `cutlass_fused_moe` calls it."""
    num_local, width = layer.num_experts // regime.ep_size, layer.intermediate_size // regime.tp_size
    inputs = [
        torch.zeros(rows, layer.hidden_size),
        torch.zeros(num_local, 2 * width, layer.hidden_size),
        None,
        torch.zeros(num_local, layer.hidden_size, width),
        None,
    ]
    spec = DynamicTensorSpec((0,), (0,), get_hybrid_num_tokens_buckets(maximum), make_hybrid_bucket_mapper(maximum))
    config = TuningConfig(dynamic_tensor_specs=(spec,))
    return [
        AutoTuner.get().choose_one(f"trtllm::fused_moe::gemm{at}", [runner], config, inputs, gemm_idx=at)[1]
        for at in (1, 2)
    ]


def choice(rows):
    return Choice(
        rows=rows, tactic=Tactic(gemm1=rows, gemm2=100 + rows), time_us=1.0, default_tactic=Tactic(gemm1=-1, gemm2=-1),
        default_time_us=2.0, gain=2.0, gain_low=1.9, gain_high=2.1, noise=0.01, tried=3, candidates=3,
        load=(2, 2, 2, 2), max_load=2, measured_at="2026-01-31T12:00:00Z",
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The arguments of each call of `tune`, which is replaced and returns at once."""
    questions = []

    def tune(layer, regime, backend, store, *, device, isolate, on_event):
        questions.append((layer, regime, backend, store, isolate))
        assert AutoTuner.get().is_tuning_mode
        environment = Environment(device="planted", strict={})
        choices = tuple(map(choice, regime.buckets))
        for index, made in enumerate(choices):
            on_event(BucketChosen(made, index, len(choices)))
        return Profile(layer=layer, regime=regime, backend=backend, environment=environment, choices=choices)

    monkeypatch.setattr(importlib.import_module("moetune.tuning.tune"), "tune", tune)
    return questions


def test_both_gemms_take_moetunes_answer_and_it_is_tuned_once(tuner, layer, regime, asked):
    runner = MoERunner(layer, regime)
    with moetune.warmup(layer, regime) as seen:
        assert call(runner, layer, regime, rows=8) == [8, 108]
        assert call(runner, layer, regime, rows=3) == [4, 104]
    assert call(runner, layer, regime, rows=2) == [2, 102], "and afterwards"
    assert not runner.seen_cache, "FlashInfer times nothing"
    ((of_layer, of_regime, backend, store, isolate),) = asked
    assert (of_layer, of_regime, backend, store) == (layer, regime, "flashinfer-cutlass", seen.store)
    assert isolate is False
    assert seen.tuned == {("flashinfer-cutlass", rows) for rows in BUCKETS}
    assert not seen.served | seen.missed


def test_the_regime_takes_the_ladder_of_the_op(tuner, layer, asked):
    regime = moetune.Regime(ep_size=4, tune_max_num_tokens=4096)
    with moetune.warmup(layer, regime):
        call(MoERunner(layer, regime), layer, regime, maximum=1024)
    assert (str(asked[0][1].ladder), asked[0][1].tune_max_num_tokens) == ("hybrid", 4096)


@pytest.mark.parametrize(
    "differing",
    [
        {"ep_size": 2},
        {"top_k": 3},
        {"weight_dtype": torch.uint8},
        {"use_fused_finalize": False},
        {"weight_dtype": torch.float8_e4m3fn, "use_deepseek_fp8_block_scale": True},
    ],
    ids=str,
)
def test_an_op_of_another_kind_is_tuned_as_flashinfer_does_it(tuner, layer, regime, asked, differing):
    runner = MoERunner(layer, regime)
    for name, value in differing.items():
        setattr(runner, name, value)
    with moetune.warmup(layer, regime):
        call(runner, layer, regime)
    assert not asked
    assert runner.seen_cache


def test_another_rank_is_not_ours(tuner, layer, regime, asked):
    with moetune.warmup(layer, regime, rank=2):
        call(MoERunner(layer, regime, rank=1), layer, regime)
    assert not asked


def test_where_moetune_cannot_time_it_flashinfer_does_and_it_is_said(tuner, layer, regime, monkeypatch, caplog):
    def tune(*question, **options):
        raise UnsupportedError("no module is built")

    monkeypatch.setattr(importlib.import_module("moetune.tuning.tune"), "tune", tune)
    runner = MoERunner(layer, regime)
    with moetune.warmup(layer, regime) as seen:
        call(runner, layer, regime)
    assert runner.seen_cache
    assert {rows for _, rows in seen.missed} == set(BUCKETS)
    assert "no module is built" in caplog.text
