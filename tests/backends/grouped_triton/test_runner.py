"""Whole forwards, under Triton's interpreter; the references are checked against a third way of computing."""

import sys

import pytest
import torch
from triton_numerics import errors_of_stages, rounded_reference, run_in_stages, staged_errors

from moetune.backends.base import Problem
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.space import VALUES, tactic_of
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import Routing, realize

REGIMES = {
    "none": Regime(ep_size=4),
    "one rank": Regime(),
    "tp": Regime(ep_size=2, tp_size=2),
    "packed": Regime(ep_size=4, attention_dp=True),
    "packed, L < k": Regime(ep_size=8, attention_dp=True),
    "deduplicated": Regime(ep_size=4, layout="deduplicated"),
    "slot": Regime(ep_size=4, layout="slot"),
    "pool": Regime(ep_size=2, layout="pool"),
}
TACTICS = tuple(
    Tactic(dict(zip(VALUES, values, strict=True)))
    for values in (
        (16, 32, 64, 1, 4, 2),
        (16, 64, 128, 16, 4, 3),  # operands swapped in fp8
        (32, 128, 64, 64, 8, 4),  # operands swapped in fp8
        (64, 64, 256, 16, 4, 3),  # clamped in fp8
        (128, 32, 128, 32, 8, 5),
    )
)


def layer_of(precision, **fields):
    sizes = {"hidden_size": 256, "intermediate_size": 256} if precision == "fp8_block" else {}
    sizes = sizes or {"hidden_size": 112, "intermediate_size": 48}
    return MoELayer(**{"num_experts": 8, "top_k": 2, "precision": precision, **sizes, **fields})


def runner_of(layer, regime, rows, routings=None, **options):
    rank = regime.ep_size - 1
    routings = routings or (realize(layer, regime, rows, rank),)
    return TritonBackend(**options).prepare(Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings)))


def relative_error(result, reference):
    return float((result.float() - reference).norm() / reference.norm())


def assert_right(runner, tactic, precision, draw=0):
    out = runner.run(tactic, draw)
    assert relative_error(out, runner.reference(draw)) <= (1e-2 if precision == "bf16" else 8e-2)
    assert relative_error(out, rounded_reference(runner, draw)) <= 4e-3


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
@pytest.mark.parametrize("name", REGIMES)
def test_right_in_every_regime(name, precision):
    layer = layer_of(precision)
    runner = runner_of(layer, REGIMES[name], 18)
    assert_right(runner, TritonBackend().default(layer, REGIMES[name], 18), precision)


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_right_for_every_kind_of_tile(precision):
    runner = runner_of(layer_of(precision), REGIMES["packed"], 21)
    for tactic in TACTICS:
        assert_right(runner, tactic, precision)


@pytest.mark.parametrize("values", [(8, 64, 128, 2, 1, 7), (16, 16, 32, 4, 2, 1)])
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_right_for_tiles_of_shipped_files_that_no_search_times(precision, values):
    runner = runner_of(layer_of(precision), REGIMES["packed"], 21)
    assert_right(runner, tactic_of(*values), precision)


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_each_stage_is_judged_on_its_own_input(precision):
    """A wrong weight of the second GEMM is the second stage's error alone, one of the first GEMM the first's alone."""
    runner = runner_of(layer_of(precision), REGIMES["deduplicated"], 18)
    assert max(staged_errors(runner, TACTICS[0])) <= 4e-3
    for stage, matrices in enumerate((runner._experts.w1, runner._experts.w2)):
        right = matrices.values.clone()
        matrices.values[:, :16] = 0
        wrong = run_in_stages(runner, TACTICS[0])
        matrices.values.copy_(right)
        errors = errors_of_stages(runner, *wrong)
        assert errors[stage] > 0.05
        assert errors[1 - stage] <= 4e-3


def test_weights_are_kept_for_the_next_bucket_and_its_inputs_are_the_same_as_without() -> None:
    layer, regime = layer_of("bf16"), REGIMES["packed"]
    rank = regime.ep_size - 1
    backend = TritonBackend()
    first, again = (
        backend.prepare(
            Problem(layer, regime, rows, regime.shard(layer, rank), as_draws([realize(layer, regime, rows, rank)]))
        )
        for rows in (4, 9)
    )
    assert first._experts is again._experts
    alone = runner_of(layer, regime, 9)
    assert torch.equal(again._input(0), alone._input(0))
    assert torch.equal(again.run(TACTICS[0]), alone.run(TACTICS[0]))


@pytest.mark.parametrize("remote", ["drop", "zero"])
@pytest.mark.parametrize("name", ["none", "packed, L < k", "pool"])
def test_remote_slots_add_nothing(name, remote):
    runner = runner_of(layer_of("bf16"), REGIMES[name], 18, remote=remote)
    runner._products.fill_(float("nan"))
    assert_right(runner, TACTICS[0], "bf16")


@pytest.mark.parametrize("remote", ["drop", "zero"])
def test_rows_without_a_local_slot_are_zero(remote):
    layer, ids = layer_of("bf16"), torch.tensor([[0, 1], [-1, -1], [6, 0]], dtype=torch.int32)
    routing = Routing(ids, torch.full((3, 2), 0.5), torch.tensor([1, 0]))
    runner = runner_of(layer, REGIMES["none"], 3, (routing,), remote=remote)
    out = runner.run(TACTICS[0])
    assert out[:2].abs().max() == 0
    assert relative_error(out, runner.reference()) <= 1e-2


@pytest.mark.parametrize(("rows", "is_sorted"), [(1, False), (2, False), (3, True)])
def test_few_slots_of_a_whole_layer_skip_the_sort(rows, is_sorted):
    layer = layer_of("bf16", num_experts=16)
    runner = runner_of(layer, Regime(), rows)
    assert runner._shapes.sorted == is_sorted
    assert_right(runner, TACTICS[1], "bf16")


def test_each_draw_has_its_own_routing_and_input():
    layer, regime = layer_of("bf16"), REGIMES["packed"]
    runner = runner_of(layer, regime, 9, tuple(realize(layer, regime, 9, 3, draw) for draw in range(3)))
    outs = [runner.run(TACTICS[0], draw).clone() for draw in (0, 1, 2, 0)]
    assert torch.equal(outs[0], outs[3])
    assert not torch.equal(outs[0], outs[1])
    for draw in range(3):
        assert_right(runner, TACTICS[0], "bf16", draw)


def test_gelu_is_computed_where_the_layer_has_it():
    assert_right(runner_of(layer_of("bf16", activation="gelu"), REGIMES["packed"], 5), TACTICS[0], "bf16")


ENGINE_KERNEL = '''
import an_extension_that_is_not_installed
import triton
import triton.language as tl


@triton.jit
def _scaled(product, a_scale, b_scale, on: tl.constexpr):
    if on:
        product = product * a_scale[:, None] * b_scale[None, :]
    return product


@triton.jit
def fused_moe_kernel(
    a_ptr, b_ptr, c_ptr, b_bias_ptr, a_scale_ptr, b_scale_ptr, topk_weights_ptr, sorted_token_ids_ptr, expert_ids_ptr,
    num_tokens_post_padded_ptr, N, K, EM, num_valid_tokens, stride_am, stride_ak, stride_be, stride_bk, stride_bn,
    stride_cm, stride_cn, stride_asm, stride_ask, stride_bse, stride_bsk, stride_bsn, group_n: tl.constexpr,
    group_k: tl.constexpr, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr, MUL_ROUTED_WEIGHT: tl.constexpr, top_k: tl.constexpr, use_fp8_w8a8: tl.constexpr,
    later: tl.constexpr = False,
):
    """One tile after another, by the strides alone."""
    tile_m, tile_n = tl.program_id(0) // tl.cdiv(N, BLOCK_SIZE_N), tl.program_id(0) % tl.cdiv(N, BLOCK_SIZE_N)
    if tile_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    slot = tl.load(sorted_token_ids_ptr + tile_m * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M))
    real = slot < num_valid_tokens
    e = tl.load(expert_ids_ptr + tile_m)
    n = tile_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    total = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_SIZE_K):
        k = start + tl.arange(0, BLOCK_SIZE_K)
        a_mask, b_mask = real[:, None] & (k < K)[None, :], (k < K)[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + (slot // top_k)[:, None] * stride_am + k[None, :] * stride_ak, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + e * stride_be + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=b_mask, other=0.0)
        product = tl.dot(a, b)
        if use_fp8_w8a8:
            depth = start // group_k
            a_scale = tl.load(a_scale_ptr + slot // top_k * stride_asm + depth * stride_ask, mask=real, other=0.0)
            b_scale = tl.load(
                b_scale_ptr + e * stride_bse + n // group_n * stride_bsn + depth * stride_bsk, mask=n < N, other=0.0
            )
            product = _scaled(product, a_scale, b_scale, use_fp8_w8a8)
        total += product
    if MUL_ROUTED_WEIGHT:
        total *= tl.load(topk_weights_ptr + slot, mask=real, other=0.0)[:, None]
    tl.store(
        c_ptr + slot[:, None] * stride_cm + n[None, :] * stride_cn,
        total.to(c_ptr.dtype.element_ty),
        mask=real[:, None] & (n < N)[None, :],
    )
'''


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_an_installed_engines_kernel_is_run_from_its_source_alone(precision, tmp_path, monkeypatch):
    home = tmp_path / "vllm" / "model_executor" / "layers" / "fused_moe"
    home.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('is not to be imported')")
    (home / "fused_moe.py").write_text(ENGINE_KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    runner = runner_of(layer_of(precision), REGIMES["packed"], 18, kernel="vllm")
    for tactic in TACTICS[:2]:
        assert_right(runner, tactic, precision)
    assert "vllm" not in sys.modules
    strict = TritonBackend("vllm").environment()
    assert strict["kernel"] == "vllm"
    assert strict["kernel_source"] != TritonBackend().environment()["kernel_source"]
