"""`cutlass_fused_moe` in a warm-up: both of its tuner calls are answered by moetune's own timing."""

import importlib
from typing import Any

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

    use_deepseek_fp8_block_scale = use_w4_group_scaling = use_mxfp8_act_scaling = min_latency_mode = False
    use_packed_weights = use_wfp4afp8_humming = False
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


def call(runner, layer, regime, rows=8, maximum=8, hidden=None, width=None, packed=1):
    """The tactics of both GEMMs, with the tuner called as `cutlass_fused_moe` calls it."""
    num_local, hidden = layer.num_experts // regime.ep_size, hidden or layer.hidden_size
    width = width or layer.intermediate_size // regime.tp_size
    inputs = [
        torch.zeros(rows, hidden),
        torch.zeros(num_local, 2 * width, hidden // packed),
        None,
        torch.zeros(num_local, hidden, width // packed),
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
        backend = backend if isinstance(backend, str) else backend.name
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
        {"use_w4_group_scaling": True},
        {"use_packed_weights": True},
        {"weight_dtype": torch.float8_e4m3fn, "use_mxfp8_act_scaling": True},
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


W4 = {"weight_dtype": torch.uint8, "use_w4_group_scaling": True}
FP8 = {"weight_dtype": torch.float8_e4m3fn}
PADDED = {"hidden_size": 160, "intermediate_size": 96}
WIDE = {"precision": "mxfp4", "hidden_size": 352, "intermediate_size": 96}
MXFP4 = {"precision": "mxfp4", **PADDED}
FORMATS: dict[str, tuple[Any, ...]] = {
    "mxfp4 in vllm": (MXFP4, W4, (256, 128), {}),
    "mxfp4 in sglang": (MXFP4, {**W4, "use_fused_finalize": False}, (256, 128), {"caller": "sglang"}),
    "padded by sglang alone": (
        WIDE, W4, (512, 128), {"caller": "sglang"},
    ),
    "padded by vllm": (
        WIDE, W4, (384, 128), {},
    ),
    "mxfp4 with fp8": (
        MXFP4, {**W4, "use_wfp4afp8_humming": True}, (256, 128), {"mxfp4_activations": "fp8"},
    ),
    "fp8_tensor": ({"precision": "fp8_tensor"}, FP8, None, {}),
    "fp8_tensor in sglang": (
        {"precision": "fp8_tensor"}, {**FP8, "use_fused_finalize": False}, None, {"caller": "sglang"},
    ),
    "bf16 in sglang": ({}, {"use_fused_finalize": False}, None, {"caller": "sglang"}),
    "w4a8": (
        {"precision": "w4a8", "hidden_size": 128, "intermediate_size": 256}, {**W4, "use_packed_weights": True},
        (128, 256), {},
    ),
}  # fmt: skip


def mixed(layer, regime, name):
    """A layer of a format, its runner in an engine, how it is called, and the options with which it is tuned."""
    fields, attributes, sizes, options = FORMATS[name]
    layer = moetune.MoELayer(**{**dict(layer), **fields})
    runner = MoERunner(layer, regime)
    for attribute, value in attributes.items():
        setattr(runner, attribute, value)
    called = {"hidden": sizes[0], "width": sizes[1], "packed": 2} if sizes else {}
    return layer, runner, called, options


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_tuned_with_the_options_of_the_engines_call(tuner, layer, regime, asked, name):
    layer, runner, called, options = mixed(layer, regime, name)
    with moetune.warmup(layer, regime):
        assert call(runner, layer, regime, rows=8, **called) == [8, 108]
    ((of_layer, _, backend, *_),) = asked
    assert of_layer == layer
    if options:
        assert options.items() <= backend.environment().items()
    else:
        assert backend == "flashinfer-cutlass"


@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("mxfp4 in vllm", {"use_packed_weights": True}),
        ("mxfp4 in vllm", {"use_w4_group_scaling": False}),
        ("mxfp4 in vllm", {"weight_dtype": torch.int64}),
        ("w4a8", {"use_packed_weights": False}),
        ("w4a8", {"use_wfp4afp8_humming": True}),
    ],
)
def test_mixed_input_of_another_kind_is_tuned_as_flashinfer_does_it(tuner, layer, regime, asked, name, differing):
    layer, runner, called, _ = mixed(layer, regime, name)
    for attribute, value in differing.items():
        setattr(runner, attribute, value)
    with moetune.warmup(layer, regime):
        call(runner, layer, regime, **called)
    assert not asked
    assert runner.seen_cache


def test_sizes_that_no_engine_pads_to_are_not_ours(tuner, layer, regime, asked):
    layer, runner, called, _ = mixed(layer, regime, "mxfp4 in vllm")
    with moetune.warmup(layer, regime):
        call(runner, layer, regime, **{**called, "hidden": 192})
    assert not asked


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
