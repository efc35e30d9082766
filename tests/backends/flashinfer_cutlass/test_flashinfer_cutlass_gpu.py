"""FlashInfer's CUTLASS kernels themselves, on a GPU that has their module built."""

import pytest
import torch

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.backend import DEFAULT_TACTIC, FlashInferCutlassBackend
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


@pytest.fixture(scope="module")
def backend():
    made = FlashInferCutlassBackend()
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    return made


def layer_of(precision):
    return MoELayer(num_experts=64, top_k=8, hidden_size=1024, intermediate_size=512, precision=precision)


def prepared(backend, precision, regime, rows, draws=1):
    layer, rank = layer_of(precision), regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return backend.prepare(Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), "cuda"))


def spread(backend, precision, count):
    tactics = backend.candidates(layer_of(precision), Regime(ep_size=4), 16, "cuda").tactics
    return [DEFAULT_TACTIC, *tactics[1 :: len(tactics) // count]]


def relative_error(result, reference):
    return float((result.float() - reference).norm() / reference.norm().clamp(min=1e-9))


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.slug)
@pytest.mark.parametrize("precision", ["bf16", "fp8_tensor"])
def test_errors_are_within_the_tolerance(backend, precision, regime, rows):
    rows += rows % 2 if regime.layout == "pool" else 0
    runner = prepared(backend, precision, regime, rows)
    reference = runner.reference()
    for tactic in spread(backend, precision, 5):
        assert relative_error(runner.run(tactic), reference) <= backend.tolerance(layer_of(precision)), tactic


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensor"])
def test_every_tactic_of_each_gemm_runs_right_or_raises(backend, precision):
    """None crashes the context; what runs is right."""
    runner = prepared(backend, precision, Regime(ep_size=4, layout="deduplicated"), 129)
    reference, tactics = runner.reference(), backend.candidates(layer_of(precision), Regime(ep_size=4), 16, "cuda")
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
            assert relative_error(out, reference) <= backend.tolerance(layer_of(precision)), tactic
    assert ran > 20


def test_rows_without_a_local_expert_come_out_as_zeros(backend):
    runner = prepared(backend, "bf16", Regime(ep_size=2, layout="pool"), 64)
    for tactic in spread(backend, "bf16", 8):
        out = runner.run(tactic)
        absent = (runner.arguments()["token_selected_experts"] < 0).all(1)
        if absent.any():
            assert not out[absent].any(), tactic


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensor"])
def test_a_cuda_graph_replays_what_ran_eagerly(backend, precision):
    runner = prepared(backend, precision, Regime(ep_size=4, attention_dp=True), 33, draws=2)
    tactic = spread(backend, precision, 3)[1]
    expected = [runner.run(tactic, draw).clone() for draw in (0, 1)]
    graphs = []
    for draw in (0, 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = runner.run(tactic, draw)
        graphs.append(graph)
    for draw in (1, 0):
        graphs[draw].replay()
        assert relative_error(out, expected[draw].float()) < 5e-3


def test_a_run_keeps_no_memory(backend):
    runner = prepared(backend, "bf16", Regime(ep_size=4), 1024)
    runner.run(DEFAULT_TACTIC)
    before = torch.cuda.memory_allocated()
    for tactic in spread(backend, "bf16", 4):
        runner.run(tactic)
    assert torch.cuda.memory_allocated() == before


def test_another_tactic_takes_another_time(backend):
    """Else profile_ids do not reach the kernels."""
    from moetune.measure.clock import CudaClock

    runner = prepared(backend, "bf16", Regime(), 4096)
    calls = [lambda draw, tactic=tactic: runner.run(tactic, draw) for tactic in spread(backend, "bf16", 10)]
    means = [sum(samples) / len(samples) for samples in CudaClock("cuda").paired_samples(calls, [0] * 3)]
    assert max(means) > 1.3 * min(means)
