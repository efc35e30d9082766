"""The Marlin backend: what it takes, its defaults, and one layer computed by vLLM's ops as planted on a CPU."""

import pickle
from functools import partial

import marlin_ops
import pytest
import torch
from four_bit_layers import PRECISIONS, REGIMES, problem_of, tiny

from moetune.backends import registry
from moetune.backends.marlin import op
from moetune.backends.marlin.backend import TOLERANCE, MarlinBackend
from moetune.backends.marlin.runner import MarlinRunner
from moetune.backends.marlin.space import tactic_of
from moetune.backends.marlin.weights import random_experts
from moetune.backends.reference import reference_activation, relative_error
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime


def runner_of(problem):
    activation = partial(activate_on_cpu, problem.layer.activation)
    return MarlinRunner(problem, random_experts(problem), activation)


def activate_on_cpu(activation, gate_up, out):
    out.copy_(reference_activation(activation, *gate_up.float().chunk(2, dim=-1)))


@pytest.fixture
def ops():
    with marlin_ops.defined():
        yield


@pytest.mark.parametrize("rows", [1, 6, 34])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_the_layer_is_computed_as_by_the_reference(ops, regime, rows):
    if regime.layout == "pool":
        rows += rows % 2
    for rank in {0, regime.ep_size - 1}:
        runner = runner_of(problem_of(tiny("mxint4"), regime, rows, rank, 2))
        for draw in (0, 1):
            for tactic in (tactic_of(8), tactic_of(48, "64x128x2", "128x64x1")):
                assert relative_error(runner.run(tactic, draw), runner.reference(draw)) <= TOLERANCE
    assert marlin_ops.calls[-4:] == [(8, -1, -1, -1), (8, -1, -1, -1), (48, 64, 128, 2), (48, 128, 64, 1)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_clamped", "silu_clamped"])
def test_every_format_and_activation_is_computed(ops, precision, activation):
    biased = not precision.startswith("nvfp4")
    layer = tiny(precision, activation=activation, expert_bias=biased)
    runner = runner_of(problem_of(layer, REGIMES["all-gather"], 33, 2))
    assert relative_error(runner.run(tactic_of(16)), runner.reference()) <= TOLERANCE


def test_padding_changes_nothing(ops):
    """gpt-oss's sizes, smaller: H = 160 and I = 96 become 256 and 128."""
    layer = tiny("mxfp4", hidden_size=160, intermediate_size=96, activation="swiglu_clamped", expert_bias=True)
    runner = runner_of(problem_of(layer, REGIMES["EP"], 17, 3))
    out = runner.run(tactic_of(8))
    assert out.shape == runner.reference().shape == (17, 160)
    assert relative_error(out, runner.reference()) <= TOLERANCE


def test_an_expert_without_slots_and_rows_without_ids_are_computed(ops):
    layer, regime = tiny("mxint4"), Regime()
    problem = problem_of(layer, regime, 5, 0)
    ids = torch.full_like(problem.draws[0].routing.topk_ids, -1)
    ids[:3, :2] = torch.tensor([[3, 9], [9, 3], [3, 12]])
    problem.draws[0].routing.topk_ids.copy_(ids)
    runner = runner_of(problem)
    assert relative_error(runner.run(tactic_of(8)), runner.reference()) <= TOLERANCE
    assert not runner.run(tactic_of(8))[3:].any()


def test_the_arguments_fit_the_ops_of_both_versions(ops):
    assert op.argument_names() == names("0.26.0")
    given = {name: name for name in op.KNOWN - set(op._FIXED)}
    for version, missing in (("0.26.0", set()), ("0.33.0", {"g_idx_or_none", "perm_or_none", "is_full_k"})):
        assert op.KNOWN - set(names(version)) == missing
        arguments = dict(zip(names(version), op.ordered(names(version), given), strict=True))
        assert {name for name, value in arguments.items() if value == name} == set(given)


def names(version):
    return tuple(argument.name for argument in torch._C.parse_schema(marlin_ops.GEMM[version]).arguments)


def test_the_op_that_is_there_is_taken_and_one_with_other_arguments_is_not(ops, monkeypatch):
    assert op.load() is None
    monkeypatch.setattr(op, "argument_names", lambda: (*names("0.33.0"), "new_one"))
    assert "new_one" in op.load()[0]
    monkeypatch.setattr(op, "argument_names", lambda: tuple(set(names("0.33.0")) - {"thread_k"}))
    assert "thread_k" in op.load()[0]


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(op, "library", lambda: None)
    assert MarlinBackend().unavailable() == ("vLLM's library of MoE kernels is not installed", "pip install vllm")
    assert op.load() == MarlinBackend().unavailable()
    with pytest.raises(UnsupportedError, match="cannot run here"):
        MarlinBackend().prepare(problem_of(tiny("mxint4"), Regime(), 4, 0))


def test_a_library_that_does_not_load_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "vllm" / op.LIBRARIES[0]
    broken.parent.mkdir()
    broken.write_bytes(b"no library")
    (broken.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert op.library() == broken
    reason, hint = op.load()
    assert str(broken) in reason
    assert hint == "Install the vLLM that was built for this torch."


@pytest.mark.parametrize(
    ("layer", "tp", "reason"),
    [
        (tiny("bf16"), 1, "tunes mxint4, int4_g128, mxfp4, nvfp4, nvfp4_a16 experts, not bf16"),
        (tiny("mxint4", activation="relu2"), 1, "tunes silu, gelu, swiglu_clamped, silu_clamped, not relu2"),
        (tiny("mxint4", weight_on_input=True), 1, "to its input"),
        (tiny("nvfp4", expert_bias=True), 1, "nvfp4 without biases only"),
        (tiny("mxint4", hidden_size=2880), 1, "needs H in multiples of 128"),
        (tiny("int4_g128"), 4, "in multiples of 128 for int4 in groups of 128; H = 128, I/tp = 64"),
    ],
)
def test_what_it_does_not_compute_has_a_reason(layer, tp, reason):
    regime = Regime(tp_size=tp)
    assert reason in MarlinBackend().unsupported(layer, regime)
    with pytest.raises(UnsupportedError, match="The backend marlin"):
        MarlinBackend().candidates(layer, regime, 16, "cpu")


@pytest.mark.parametrize("name", ["kimi-k2.5", "gpt-oss-120b", "gpt-oss-20b"])
def test_the_presets_with_weights_of_4_bits_are_computed(name):
    assert MarlinBackend().unsupported(preset(name), Regime(ep_size=8)) is None
    assert "marlin" in registry.backends_computing(preset(name), Regime(ep_size=8))
    assert MarlinBackend().unsupported(preset("deepseek-r1", "nvfp4"), Regime(ep_size=8)) is None


def test_the_default_is_the_engines_and_a_candidate():
    layer, regime = preset("kimi-k2.5"), Regime(ep_size=8, dispatch="allgather")
    for formula, size in (("vllm", 8), ("sglang", 48)):
        backend = MarlinBackend(formula)
        default = backend.explained_default(layer, regime, 256)
        assert default.tactic == backend.default(layer, regime, 256) == tactic_of(size)
        assert formula.casefold() in default.source.casefold()
        assert backend.candidates(layer, regime, 256, "cpu").tactics[0] == default.tactic
        assert backend.environment()["formula"] == formula
    assert [backend.candidates(layer, regime, rows, "cpu").tactics for rows in (256,)] == [
        (tactic_of(48), *(tactic_of(size) for size in (8, 16, 32, 64)))
    ], "SGLang passes no tiles"
    with pytest.raises(UsageError, match="Unknown formula 'trtllm'"):
        MarlinBackend("trtllm")


@pytest.fixture
def able(ops, monkeypatch):
    """A backend whose ops are planted, so that it prepares on a CPU."""
    monkeypatch.setattr(MarlinBackend, "unavailable", lambda self: None)
    monkeypatch.setattr("moetune.backends.marlin.runner.activate", activate_on_cpu)
    return MarlinBackend()


def test_every_preparation_runs_the_default_once(able):
    """So no graph has to load a kernel, also that of an alignment which only more rows need."""
    layer, regime = tiny("mxint4"), Regime()
    for rows in (4, 400, 4):
        marlin_ops.calls.clear()
        able.prepare(problem_of(layer, regime, rows, 0))
        assert [size for size, *_ in marlin_ops.calls] == [able.default(layer, regime, rows)["block_size_m"]] * 2


def test_a_copy_in_another_process_asks_again_whether_it_can_run_and_loads_the_kernels(able, monkeypatch):
    problem = problem_of(tiny("mxint4"), Regime(), 4, 0)
    able.prepare(problem)
    copy = pickle.loads(pickle.dumps(able))
    marlin_ops.calls.clear()
    copy.prepare(problem)
    assert len(marlin_ops.calls) == 2
    monkeypatch.setattr(MarlinBackend, "unavailable", lambda self: ("its library is not loaded there", "Load it."))
    with pytest.raises(UnsupportedError, match="its library is not loaded there"):
        pickle.loads(pickle.dumps(copy)).prepare(problem)


def test_it_can_be_sent_to_another_process():
    again = pickle.loads(pickle.dumps(MarlinBackend("sglang")))
    assert again.environment() == MarlinBackend("sglang").environment()
