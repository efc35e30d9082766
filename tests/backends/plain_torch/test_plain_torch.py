"""The torch backend: its algorithms against an fp64 loop written here, what it leaves out, and what it prepares."""

import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.backends.base import Backend, Problem
from moetune.backends.plain_torch import algorithms as torch_algorithms
from moetune.backends.plain_torch import backend as torch_ops
from moetune.backends.plain_torch.backend import ACTIVATIONS, SCRATCH_BYTES, ScratchSizes, TorchBackend
from moetune.errors import UnsupportedError
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws

ALGORITHMS = tuple(torch_algorithms.ALGORITHMS)
PURE_EP = Regime(ep_size=4, draws=2)
PACKED = Regime(ep_size=4, attention_dp=True, draws=2)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
LOADS = ("packed", "global", "one_expert", "nothing_local", "holes", "few_local")


@dataclass(frozen=True)
class HandMadeRouting:
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def small_layer(**changes: object) -> MoELayer:
    fields = {"num_experts": 16, "top_k": 3, "hidden_size": 32, "intermediate_size": 48, "precision": "fp32"}
    return MoELayer(**{**fields, **changes})


def routing_of(load: str, rows: int, top_k: int, first: int, count: int, total: int, seed: int = 0) -> HandMadeRouting:
    """Distinct ids in each row; `load` says whose experts they are."""
    generator = torch.Generator().manual_seed(seed)
    everyone = torch.rand(rows, total, generator=generator)
    local = torch.arange(first, first + count)
    if load in ("packed", "few_local"):  # local experts first, then non-local ones
        everyone[:, local] += 1
    elif load == "nothing_local":
        everyone[:, local] -= 1
    elif load == "one_expert":
        everyone[:, local] -= 1
        everyone[:, first + count - 1] += 3
    ids = everyone.topk(top_k).indices.int()
    if load == "holes":
        ids[torch.rand(rows, generator=generator) < 0.4] = -1
        ids[:, 0] = -1
    return HandMadeRouting(ids, torch.rand(rows, top_k, generator=generator) + 0.1)


def problem_of(
    layer: MoELayer, regime: Regime, rows: int, load: str = "packed", device: str = "cpu", rank: int = 1, seed: int = 0
) -> Problem:
    shard = regime.shard(layer, rank if regime.ep_size > 1 else 0)
    top_k = 1 if regime.layout == "slot" else layer.top_k
    routings = tuple(
        routing_of(load, rows, top_k, shard.first, shard.num_local, shard.num_physical, seed + draw)
        for draw in range(2)
    )
    return Problem(layer, regime, rows, shard, as_draws(routings), device)  # type: ignore[arg-type]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if expected.any() else float(difference)


def slot_by_slot(runner: torch_ops.TorchRunner, layer: MoELayer, draw: int) -> torch.Tensor:
    """The layer in fp64, one slot at a time, from its definition."""
    experts = runner._experts
    x, ids, weights = runner._draws[draw]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, weight in zip((ids[row] - experts.first).tolist(), weights[row].double(), strict=True):
            if not 0 <= expert < experts.count:
                continue
            entering = x[row].double() * (weight if layer.weight_on_input else 1.0)
            gate_up = experts.w1[expert].double() @ entering
            gate_up += experts.b1[expert].double() if experts.b1 is not None else 0.0
            gate, up = gate_up[: len(gate_up) // 2], gate_up[len(gate_up) // 2 :]
            if layer.activation is Activation.SILU:
                hidden = gate / (1 + torch.exp(-gate)) * up
            elif layer.activation is Activation.GELU:
                hidden = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
            else:
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                hidden = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
            product = experts.w2[expert].double() @ hidden
            product += experts.b2[expert].double() if experts.b2 is not None else 0.0
            out[row] += product * (1.0 if layer.weight_on_input else weight)
    return out


def test_is_a_backend() -> None:
    assert isinstance(TorchBackend(), Backend)
    assert TorchBackend().unavailable() is None


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_definition(activation: Activation, expert_bias: bool, weight_on_input: bool) -> None:
    layer = small_layer(activation=activation, expert_bias=expert_bias, weight_on_input=weight_on_input)
    runner = TorchBackend().prepare(problem_of(layer, PURE_EP, 5, "global"))
    for draw in range(2):
        assert relative_error(runner.reference(draw), slot_by_slot(runner, layer, draw)) < 1e-6


def test_clamped_swiglu_clamps() -> None:
    experts = torch_algorithms.TorchExperts(
        0, torch.empty(1, 4, 1), torch.empty(1, 1, 2), activation=Activation.SWIGLU_CLAMPED
    )
    gated = experts.gated(torch.tensor([[100.0, 1.0, 100.0, -100.0]]))[0]
    assert gated[0] == pytest.approx(7 * 8, rel=1e-4)  # gate and up at most 7
    assert gated[1] == pytest.approx((1 - 7) / (1 + math.exp(-1.702)))  # up at least -7


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("rows", [1, 3, 16, 257])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_right_on_every_load(algorithm: str, load: str, rows: int, device: str) -> None:
    layer = small_layer(top_k=6 if load == "few_local" else 3)  # few_local: L = 4 < k
    runner = TorchBackend().prepare(problem_of(layer, PURE_EP, rows, load, device))
    for draw in range(2):
        result = runner.run(Tactic(algorithm=algorithm), draw)
        assert result.shape == (rows, 32)
        assert relative_error(result, runner.reference(draw)) <= 1e-5
    assert bool(runner.reference().any()) == (load != "nothing_local")


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_within_tolerance_in_every_precision(algorithm: str, precision: str, device: str) -> None:
    layer = small_layer(precision=precision, top_k=16, hidden_size=256, intermediate_size=128)
    backend = TorchBackend()
    runner = backend.prepare(problem_of(layer, Regime(draws=2), 19, "global", device))
    result = runner.run(Tactic(algorithm=algorithm))
    assert result.dtype == getattr(torch, torch_ops.DTYPES[Precision(precision)])
    assert relative_error(result, runner.reference()) <= backend.tolerance(layer)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("load", ["packed", "holes", "nothing_local"])
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_algorithm_knows_biases_activations_and_weights_on_the_input(
    activation: Activation, weight_on_input: bool, load: str, device: str
) -> None:
    layer = small_layer(activation=activation, expert_bias=True, weight_on_input=weight_on_input)
    runner = TorchBackend().prepare(problem_of(layer, PURE_EP, 16, load, device))
    for algorithm in ALGORITHMS:
        assert relative_error(runner.run(Tactic(algorithm=algorithm)), runner.reference()) <= 1e-5


def test_ids_other_than_a_rows_own_change_nothing() -> None:
    """Non-local ids and -1 are the same to a rank."""
    layer = small_layer(expert_bias=True)
    problem = problem_of(layer, PURE_EP, 16, "global")
    first, second = (draw.routing for draw in problem.draws)
    ids = first.topk_ids
    non_local = (ids < problem.shard.first) | (ids >= problem.shard.first + problem.shard.num_local)
    assert non_local.any()
    assert not non_local.all()
    emptied = HandMadeRouting(ids.masked_fill(non_local, -1), first.topk_weights)
    twin = Problem(layer, PURE_EP, 16, problem.shard, as_draws((emptied, second)))  # type: ignore[arg-type]
    backend = TorchBackend()
    for algorithm in ALGORITHMS:
        tactic = Tactic(algorithm=algorithm)
        assert torch.equal(backend.prepare(problem).run(tactic), backend.prepare(twin).run(tactic))


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40),
    top_k=st.integers(1, 8),
    ep_size=st.sampled_from([1, 2, 4, 8]),
    tp_size=st.sampled_from([1, 2]),
    load=st.sampled_from(LOADS),
    bias=st.booleans(),
    on_input=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 1000),
)
def test_all_algorithms_agree(
    rows: int,
    top_k: int,
    ep_size: int,
    tp_size: int,
    load: str,
    bias: bool,
    on_input: bool,
    activation: Activation,
    seed: int,
) -> None:
    layer = small_layer(top_k=top_k, expert_bias=bias, weight_on_input=on_input, activation=activation)
    regime = Regime(ep_size=ep_size, tp_size=tp_size, draws=2)
    runner = TorchBackend().prepare(problem_of(layer, regime, rows, load, rank=ep_size - 1, seed=seed))
    assert runner._experts.w2.shape == (16 // ep_size, 32, 48 // tp_size)
    for algorithm in ALGORITHMS:
        assert relative_error(runner.run(Tactic(algorithm=algorithm)), runner.reference()) <= 1e-5


def test_slot_layout_has_one_id_a_row() -> None:
    layer = small_layer()
    runner = TorchBackend().prepare(problem_of(layer, Regime(ep_size=4, layout="slot", draws=2), 9))
    for algorithm in ALGORITHMS:
        assert relative_error(runner.run(Tactic(algorithm=algorithm)), runner.reference()) <= 1e-5


def test_grouped_mm_is_tried_before_it_is_offered() -> None:
    assert torch_algorithms.grouped_mm_missing(32, 48, torch.float32, "cpu") is None
    assert "refuses torch.int32" in str(torch_algorithms.grouped_mm_missing(32, 48, torch.int32, "cpu"))


def test_grouped_mm_is_left_out_where_the_build_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_algorithms, "grouped_gemm", lambda: None)
    candidates = TorchBackend().candidates(small_layer(), PURE_EP, 4, "cpu")
    assert "no grouped GEMM" in candidates.excluded[Tactic(algorithm="grouped_mm")]
    assert Tactic(algorithm="segment_mm") in candidates.tactics


def test_offers_all_six_with_the_default_among_them() -> None:
    backend = TorchBackend()
    candidates = backend.candidates(small_layer(), PACKED, 8, "cpu")
    assert {str(tactic) for tactic in candidates.tactics} == set(ALGORITHMS)
    assert not candidates.excluded
    assert backend.default(small_layer(), PACKED, 8) == Tactic(algorithm="eager")


def test_a_tactic_whose_scratch_would_not_fit_is_left_out_with_the_reason() -> None:
    layer = MoELayer(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
    regime = Regime(ep_size=8, attention_dp=True)
    candidates = TorchBackend(scratch_limit_bytes=1 << 30).candidates(layer, regime, 128, "cpu")
    assert [str(tactic) for tactic in candidates.excluded] == ["batched_mm"]  # 128·8 slots of 9 MiB
    assert "needs up to 9,2" in candidates.excluded[Tactic(algorithm="batched_mm")]
    assert "1,024 MiB allowed" in candidates.excluded[Tactic(algorithm="batched_mm")]
    assert not TorchBackend(scratch_limit_bytes=1 << 30).candidates(layer, regime, 1, "cpu").excluded


def test_the_default_stays_however_little_memory_there_is() -> None:
    candidates = TorchBackend(scratch_limit_bytes=0).candidates(small_layer(), PACKED, 8, "cpu")
    assert candidates.tactics == (Tactic(algorithm="eager"),)
    assert len(candidates.excluded) == 5


def test_the_scratch_limit_is_a_share_of_what_is_free_after_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_layer()
    weight_bytes = 3 * 4 * 48 * 32 * 4
    needed = SCRATCH_BYTES["dense"](ScratchSizes.of(layer, PACKED, 8))
    dense = Tactic(algorithm="dense")
    monkeypatch.setattr(torch_ops, "available_bytes", lambda device: weight_bytes + 4 * needed)
    assert dense in TorchBackend().candidates(layer, PACKED, 8, "cpu").tactics
    monkeypatch.setattr(torch_ops, "available_bytes", lambda device: weight_bytes + 4 * needed - 4)
    assert dense in TorchBackend().candidates(layer, PACKED, 8, "cpu").excluded


def test_available_memory_is_within_the_machines() -> None:
    assert 0 < torch_ops.available_bytes("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("load", ["packed", "one_expert"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scratch_bound_holds_on_the_gpu(algorithm: str, load: str) -> None:
    layer = MoELayer(num_experts=32, top_k=4, hidden_size=1024, intermediate_size=512)
    regime = Regime(ep_size=4, draws=2)
    runner = TorchBackend().prepare(problem_of(layer, regime, 512, load, "cuda"))
    runner.run(Tactic(algorithm=algorithm))  # cuBLAS's workspace is not the call's
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.run(Tactic(algorithm=algorithm))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= SCRATCH_BYTES[algorithm](ScratchSizes.of(layer, regime, 512))


@pytest.mark.parametrize("precision", [p for p in Precision if p not in torch_ops.DTYPES])
def test_quantized_weights_are_refused_with_a_way_out(precision: Precision) -> None:
    layer = small_layer(precision=precision)
    assert "--precision bf16" in str(TorchBackend().unsupported(layer, PACKED))
    with pytest.raises(UnsupportedError, match="--precision bf16"):
        TorchBackend().candidates(layer, PACKED, 8, "cpu")
    with pytest.raises(UnsupportedError, match="--precision bf16"):
        TorchBackend().prepare(problem_of(layer, PURE_EP, 2))


def test_weights_and_inputs_depend_on_the_seed_alone() -> None:
    layer = small_layer(expert_bias=True)
    one = TorchBackend().prepare(problem_of(layer, PURE_EP, 4))
    same = TorchBackend().prepare(problem_of(layer, PURE_EP, 4))
    other = TorchBackend().prepare(problem_of(layer, Regime(ep_size=4, draws=2, seed=1), 4))
    assert torch.equal(one.reference(), same.reference())
    assert not torch.equal(one._experts.w1, other._experts.w1)
    assert one._experts.w1.std() == pytest.approx(32**-0.5, rel=0.05)
    assert one._experts.w2.std() == pytest.approx(48**-0.5, rel=0.05)


def test_no_row_has_the_same_input_in_two_draws() -> None:
    runner = TorchBackend().prepare(problem_of(small_layer(), PURE_EP, 4))
    first, second = runner._draws[0][0], runner._draws[1][0]
    assert not (first == second).all(dim=1).any()
    assert (first != 0).all()


def test_weights_are_kept_from_bucket_to_bucket() -> None:
    backend = TorchBackend()
    one = backend.prepare(problem_of(small_layer(), PURE_EP, 4))
    assert backend.prepare(problem_of(small_layer(), PURE_EP, 8))._experts is one._experts
    assert backend.prepare(problem_of(small_layer(top_k=2), PURE_EP, 8))._experts is not one._experts


def test_reference_is_full_fp32_under_any_precision_setting() -> None:
    runner = TorchBackend().prepare(problem_of(small_layer(), PURE_EP, 4))
    expected = runner.reference()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(runner.reference(), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
