"""FlashInfer's CUTLASS kernels themselves, on a GPU that has their module built."""

from functools import cache

import pytest
import torch
from graphs import replayed_error

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.backend import DEFAULT_TACTIC, FlashInferCutlassBackend
from moetune.errors import UnsupportedError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

pytestmark = pytest.mark.gpu

REGIMES = [
    Regime(),
    Regime(ep_size=4),
    Regime(ep_size=4, dispatch="allgather"),
    Regime(ep_size=4, attention_dp=True),
    Regime(ep_size=32, attention_dp=True),
    Regime(ep_size=4, layout="deduplicated"),
    Regime(ep_size=4, layout="slot"),
    Regime(ep_size=2, layout="pool"),
    Regime(ep_size=4, tp_size=2),
]


DEVICE = "cuda"
GPT_OSS = {"activation": "swiglu_clamped", "expert_bias": True, "hidden_size": 1120, "intermediate_size": 576}
KINDS = {
    "bf16": ({}, {}),
    "bf16 in sglang": ({}, {"caller": "sglang"}),
    "bf16 of gpt-oss": (GPT_OSS, {}),
    "fp8_tensor": ({"precision": "fp8_tensor"}, {}),
    "mxfp4": ({"precision": "mxfp4"}, {}),
    "mxfp4 of gpt-oss": ({"precision": "mxfp4", **GPT_OSS}, {}),
    "mxfp4 of gpt-oss in sglang": ({"precision": "mxfp4", **GPT_OSS}, {"caller": "sglang"}),
    "mxfp4 of deepseek-v4": ({"precision": "mxfp4", "activation": "silu_clamped"}, {}),
    "mxfp4 with fp8": ({"precision": "mxfp4"}, {"mxfp4_activations": "fp8"}),
    "mxfp4 of gpt-oss with fp8": ({"precision": "mxfp4", **GPT_OSS}, {"mxfp4_activations": "fp8"}),
    "w4a8": ({"precision": "w4a8"}, {}),
}
"""Fields of the layer and options of the backend. gpt-oss's sizes are padded, in SGLang more than in vLLM."""


@cache
def backend_of(kind):
    return FlashInferCutlassBackend(**KINDS[kind][1])


@pytest.fixture
def backend(kind):
    made = backend_of(kind)
    try:
        made.candidates(layer_of(kind), Regime(ep_size=4), 16, DEVICE)
    except UnsupportedError as error:
        pytest.skip(error.message)
    return made


def layer_of(kind):
    return MoELayer(**{"num_experts": 64, "top_k": 8, "hidden_size": 1024, "intermediate_size": 512, **KINDS[kind][0]})


def prepared(kind, regime, rows, draws=1):
    layer, rank = layer_of(kind), regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    problem = Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), DEVICE)
    return backend_of(kind).prepare(problem)


def spread(kind, count, regime=REGIMES[1]):
    tactics = backend_of(kind).candidates(layer_of(kind), regime, 16, DEVICE).tactics
    return [DEFAULT_TACTIC, *tactics[1 :: max(1, len(tactics) // count)]]


def relative_error(result, reference):
    return float((result.float() - reference).norm() / reference.norm().clamp(min=1e-9))


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.slug)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_the_tolerance(backend, kind, regime, rows):
    """Few rows leave experts empty, and on 32 ranks each has two experts of the eight that a row has ids of."""
    rows += rows % 2 if regime.layout == "pool" else 0
    runner = prepared(kind, regime, rows)
    reference = runner.reference()
    for tactic in spread(kind, 5, regime):
        assert relative_error(runner.run(tactic), reference) <= backend.tolerance(layer_of(kind)), tactic


@pytest.mark.parametrize("kind", KINDS)
def test_every_tactic_of_each_gemm_runs_right_or_raises(backend, kind):
    """None crashes the context; what runs is right."""
    runner = prepared(kind, Regime(ep_size=4, layout="deduplicated"), 129)
    reference, tactics = runner.reference(), backend.candidates(layer_of(kind), Regime(ep_size=4), 16, DEVICE)
    first, last = tactics.tactics[1], tactics.tactics[-1]
    ran = 0
    for tactic in tactics.tactics[1:]:
        if tactic["gemm2"] == first["gemm2"] or tactic["gemm1"] == last["gemm1"]:
            try:
                out = runner.run(tactic)
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(tactic, error)
                continue
            ran += 1
            assert relative_error(out, reference) <= backend.tolerance(layer_of(kind)), tactic
    assert ran > 20


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp4 with fp8", "w4a8"])
def test_flashinfers_own_autotune_takes_the_call_and_chooses_among_these_tactics(backend, kind):
    from moetune.dep_bench.flashinfer_choice import own_autotune, own_pick

    runner = prepared(kind, Regime(ep_size=4), 16)
    own_autotune(runner)
    assert own_pick(runner) in backend.candidates(layer_of(kind), Regime(ep_size=4), 16, DEVICE).tactics


@pytest.mark.parametrize("kind", ["bf16", "mxfp4 of gpt-oss", "w4a8"])
def test_rows_without_a_local_expert_come_out_as_zeros(backend, kind):
    regime = Regime(ep_size=2, layout="pool")
    runner = prepared(kind, regime, 64)
    for tactic in spread(kind, 8, regime):
        out = runner.run(tactic)
        absent = (runner.arguments()["token_selected_experts"] < 0).all(1)
        if absent.any():
            assert not out[absent].any(), tactic


@pytest.mark.parametrize("kind", ["bf16", "fp8_tensor", "mxfp4 of gpt-oss", "mxfp4 with fp8", "w4a8"])
def test_a_cuda_graph_replays_what_ran_eagerly(backend, kind):
    runner = prepared(kind, Regime(ep_size=4, attention_dp=True), 33, draws=2)
    tactic = spread(kind, 3)[1]
    assert replayed_error(runner, tactic) < 5e-3


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
def test_a_run_keeps_no_memory(backend, kind):
    runner = prepared(kind, Regime(ep_size=4), 1024)
    runner.run(DEFAULT_TACTIC)
    before = torch.cuda.memory_allocated()
    for tactic in spread(kind, 4):
        runner.run(tactic)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
def test_another_tactic_takes_another_time(backend, kind):
    """Else profile_ids do not reach the kernels."""
    from moetune.measure.clock import CudaClock

    runner = prepared(kind, Regime(), 4096)
    calls = [lambda draw, tactic=tactic: runner.run(tactic, draw) for tactic in spread(kind, 10)]
    means = [sum(samples) / len(samples) for samples in CudaClock("cuda").paired_samples(calls, [0] * 3)]
    assert max(means) > 1.3 * min(means)
