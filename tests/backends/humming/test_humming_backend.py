"""The Humming backend: what it takes, its environment, and one layer computed by plain torch in Humming's place."""

import pickle

import pytest
import torch
from four_bit_layers import PRECISIONS, REGIMES, problem_of, tiny
from planted_ops import AUTO_BLOCK_M, PlantedOps

from moetune.backends import registry
from moetune.backends.base import Problem
from moetune.backends.humming import package
from moetune.backends.humming.backend import TOLERANCE, HummingBackend
from moetune.backends.humming.config import Config
from moetune.backends.humming.formulas import estimated_slots
from moetune.backends.humming.gemm import gemms
from moetune.backends.humming.ops import activation_code, of_interval
from moetune.backends.humming.runner import HummingExperts, HummingRunner
from moetune.backends.humming.space import AUTO, tactic_of
from moetune.backends.humming.weights import StoredMatrices, random_experts
from moetune.backends.marlin.formats import FORMATS
from moetune.backends.marlin.matrices import group_scales, nearest_codes
from moetune.backends.reference import relative_error
from moetune.errors import UnsupportedError
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import Activation
from moetune.spec.regime import Regime

FAST = "wgmma-32x256x64-32x32x64-s4-b1-producer-streamk"
SMALL = "mma-8x128x64-8x64x32-s4-b4-streamk"


def runner_of(problem):
    ops = PlantedOps()
    return HummingRunner(problem, HummingExperts.of(problem, random_experts(problem), ops), ops), ops


@pytest.mark.parametrize("rows", [1, 6, 34])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_the_layer_is_computed_as_by_the_reference(regime, rows):
    if regime.layout == "pool":
        rows += rows % 2
    layer = tiny("mxint4")
    for rank in {0, regime.ep_size - 1}:
        runner, ops = runner_of(problem_of(layer, regime, rows, rank, 2))
        for draw in (0, 1):
            for tactic in (tactic_of(), tactic_of(FAST, SMALL)):
                assert relative_error(runner.run(tactic, draw), runner.reference(draw)) <= TOLERANCE
    slots = estimated_slots(layer, regime, rows)
    assert [call for call in ops.calls[-4:] if call[0] != "aligned"][-2:] == [(FAST, slots), (SMALL, slots)]


def test_indexed_gemms_are_aligned_again_only_if_their_blocks_differ():
    runner, ops = runner_of(problem_of(tiny("mxint4"), Regime(), 6, 0))
    for tactic, sizes in (
        (tactic_of(), [AUTO_BLOCK_M]),
        (tactic_of(FAST, FAST), [32]),
        (tactic_of(FAST), [32, AUTO_BLOCK_M]),
        (tactic_of(SMALL, FAST), [8, 32]),
    ):
        ops.calls.clear()
        runner.run(tactic)
        assert [size for name, size in ops.calls if name == "aligned"] == sizes


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_clamped", "silu_clamped"])
def test_every_format_and_activation_is_computed(precision, activation):
    layer = tiny(precision, activation=activation, expert_bias=True)
    runner, _ = runner_of(problem_of(layer, REGIMES["all-gather"], 33, 2))
    assert relative_error(runner.run(tactic_of(FAST)), runner.reference()) <= TOLERANCE


def test_an_expert_without_slots_and_rows_without_ids_are_computed():
    for regime in (Regime(), Regime(ep_size=2)):
        problem = problem_of(tiny("mxint4"), regime, 5, 0)
        ids = torch.full_like(problem.draws[0].routing.topk_ids, -1)
        ids[:3, :2] = torch.tensor([[3, 7], [7, 3], [3, 5]])
        problem.draws[0].routing.topk_ids.copy_(ids)
        runner, _ = runner_of(problem)
        assert relative_error(runner.run(tactic_of()), runner.reference()) <= TOLERANCE
        assert not runner.run(tactic_of())[3:].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stored_weights_are_those_that_were_quantized(precision):
    layer = tiny(precision, hidden_size=256)
    first, _ = gemms(layer, Regime())
    stored = StoredMatrices.random(first, 2, torch.Generator().manual_seed(3))
    drawn = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(3)).mul_(256**-0.5).view(512, 256)
    groups = drawn.view(512, -1, first.format.group)
    scales, expert_scale = group_scales(first.format, groups)
    codes = nearest_codes(first.format, groups, scales * expert_scale).view(512, 256).long()
    assert relative_error(stored.fp32(0), drawn) < 0.15
    values = torch.tensor(first.format.values)[codes]
    assert torch.equal(stored.fp32(0), values * (scales * expert_scale).repeat_interleave(first.format.group, 1))
    words = codes[0, :8] << torch.arange(0, 32, 4)
    assert int(stored.codes[0, 0, 0]) & 0xFFFFFFFF == int(words.sum())


def test_a_table_is_looked_up_as_humming_does():
    table = [(0, 8, {"a": 1}), (8, 64, {"a": 2}), (64, 1 << 30, {"a": 3})]
    assert [of_interval(table, slots)["a"] for slots in (1, 8, 9, 64, 65, 10**6)] == [1, 1, 2, 2, 3, 3]
    with pytest.raises(LookupError, match="no configuration for 0 slots"):
        of_interval(table, 0)


def test_an_activation_is_an_expression_of_gate_and_up():
    assert activation_code(Activation.SILU) == "a / (1.f + expf(-a)) * b"
    clamped = activation_code(Activation.SWIGLU_CLAMPED)
    assert "fminf(a, 7.0f)" in clamped
    assert "expf(-1.702f * gate)" in clamped
    assert "(up + 1.0f)" in clamped
    assert clamped.count("{") == clamped.count("}") == 1


def test_without_the_package_it_says_what_to_install(monkeypatch):
    install = "pip install 'humming-kernels[cu13]==0.1.19'"
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    assert HummingBackend().unavailable() == ("humming-kernels is not installed", install)
    with pytest.raises(UnsupportedError, match="cannot run here: humming-kernels is not installed"):
        HummingBackend().prepare(problem_of(tiny("mxint4"), Regime(), 4, 0))


def test_another_version_of_the_package_is_named(monkeypatch):
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(package, "version", lambda: "0.1.12")
    reason, _ = package.missing()
    assert reason == "humming-kernels 0.1.12 is installed, and moetune knows 0.1.19, which vLLM 0.33.0 pins"


@pytest.mark.parametrize(
    ("layer", "regime", "reason"),
    [
        (tiny("bf16"), Regime(), "tunes mxint4, int4_g128, mxfp4, nvfp4, nvfp4_a16 experts, not bf16"),
        (tiny("mxint4", activation="relu2"), Regime(), "tunes silu, gelu, swiglu_clamped, silu_clamped, not relu2"),
        (tiny("mxint4", weight_on_input=True), Regime(), "to its input"),
        (tiny("int4_g128"), Regime(tp_size=4), "multiples of 128 for int4 in groups of 128; H = 128, I/tp = 64"),
        (tiny("mxint4"), Regime(ep_size=4, layout="batched"), "not the expert-major rows of the layout batched"),
    ],
)
def test_what_it_does_not_compute_has_a_reason(layer, regime, reason):
    assert reason in HummingBackend().unsupported(layer, regime)
    with pytest.raises(UnsupportedError, match="The backend humming"):
        HummingBackend().candidates(layer, regime, 16, "cpu")


@pytest.mark.parametrize("name", ["kimi-k2.5", "gpt-oss-120b", "gpt-oss-20b"])
def test_the_presets_with_weights_of_4_bits_are_computed(name):
    assert "humming" in registry.backends_computing(preset(name), Regime(ep_size=8))


def test_the_default_is_hummings_heuristic_for_the_slots_that_vllm_estimates():
    layer, regime = preset("kimi-k2.5"), Regime(ep_size=8, dispatch="allgather")
    default = HummingBackend().explained_default(layer, regime, 256)
    assert default.tactic == HummingBackend().default(layer, regime, 256) == tactic_of(AUTO, AUTO)
    assert default.source == "Humming's heuristic for 256 slots, which vLLM 0.33 estimates"


def test_a_kernel_has_one_key_in_all_buckets_and_the_heuristics_has_none():
    backend, layer, regime = HummingBackend(), preset("kimi-k2.5"), Regime(ep_size=8)
    assert backend.compile_keys(layer, regime, 16, tactic_of()) == []
    assert backend.compile_keys(layer, regime, 16, tactic_of(AUTO, FAST)) == [
        (gemms(layer, regime)[1], Config.parse(FAST))
    ]
    assert len(set(backend.compile_keys(layer, regime, 16, tactic_of(FAST, FAST)))) == 2
    assert backend.compile_keys(layer, regime, 16, tactic_of(FAST)) == backend.compile_keys(
        layer, regime, 512, tactic_of(FAST, AUTO)
    )
    other = backend.compile_keys(layer.model_copy(update={"precision": "mxfp4"}), regime, 16, tactic_of(FAST))
    assert other != backend.compile_keys(layer, regime, 16, tactic_of(FAST))


def test_the_searchs_first_batch_is_compiled_ahead():
    backend, layer, regime = HummingBackend(), preset("kimi-k2.5"), Regime(ep_size=8)
    problem = Problem(layer, regime, 16, regime.shard(layer), ())
    found = backend.candidates(layer, regime, 16, "cpu")
    assert tuple(backend.likely(problem, found)) == next(backend.search(problem, found, ())).tactics


def test_it_can_be_sent_to_another_process():
    again = pickle.loads(pickle.dumps(HummingBackend()))
    assert again.environment() == {"humming": package.version()}
    assert set(FORMATS) == set(PRECISIONS)
