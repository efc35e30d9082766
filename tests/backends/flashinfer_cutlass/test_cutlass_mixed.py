"""Mixed input in the CUTLASS backend: mxfp4 with bf16 or e4m3, int4 with e4m3, padding, biases and clamps."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

flashinfer = pytest.importorskip("flashinfer.fused_moe")
from flashinfer.fused_moe import core, prepare, runners  # noqa: E402
from planted_cutlass import OP, FakeRunner, problem, relative_error, small  # noqa: E402

from moetune.backends import registry  # noqa: E402
from moetune.backends.flashinfer_cutlass.backend import DEFAULT_TACTIC, FlashInferCutlassBackend  # noqa: E402
from moetune.backends.flashinfer_cutlass.experts import CutlassExperts  # noqa: E402
from moetune.backends.flashinfer_cutlass.formats import FORMATS, OPTIONS, format_of  # noqa: E402
from moetune.backends.flashinfer_cutlass.four_bits import from_int4, from_mxfp4, to_int4, to_mxfp4  # noqa: E402
from moetune.errors import UnsupportedError, UsageError  # noqa: E402
from moetune.inputs.presets import layer as preset  # noqa: E402
from moetune.spec.enums import Precision  # noqa: E402
from moetune.spec.regime import Regime  # noqa: E402
from moetune.spec.tactic import Tactic  # noqa: E402

GPT_OSS = {"activation": "swiglu_clamped", "expert_bias": True}
PADDED = {"hidden_size": 160, "intermediate_size": 96}
WHOLE = {"hidden_size": 128, "intermediate_size": 128}
CASES = {
    "mxfp4": ({"precision": "mxfp4", **WHOLE}, {}, 1e-2),
    "mxfp4 padded": ({"precision": "mxfp4", **PADDED}, {}, 1e-2),
    "mxfp4 of gpt-oss": ({"precision": "mxfp4", **PADDED, **GPT_OSS}, {}, 1e-2),
    "mxfp4 of gpt-oss, sglang": ({"precision": "mxfp4", **PADDED, **GPT_OSS}, {"caller": "sglang"}, 1e-2),
    "mxfp4 with fp8": ({"precision": "mxfp4", **PADDED, **GPT_OSS}, {"mxfp4_activations": "fp8"}, 5e-2),
    "mxfp4 of deepseek-v4": ({"precision": "mxfp4", **WHOLE, "activation": "silu_clamped"}, {}, 1e-2),
    "w4a8": ({"precision": "w4a8", **WHOLE}, {}, 5e-2),
    "w4a8 of gpt-oss": ({"precision": "w4a8", **WHOLE, **GPT_OSS}, {}, 5e-2),
    "bf16 of gpt-oss": (GPT_OSS, {}, 1e-2),
    "bf16 in sglang": ({}, {"caller": "sglang"}, 1e-2),
    "fp8_tensor with biases": ({"precision": "fp8_tensor", "expert_bias": True}, {}, 5e-2),
}
matrices = st.integers(0, 2**31).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1e-6, 0.02, 1.0, 3e4]))
)


def drawn(seed, rows, blocks, size):
    return torch.randn(rows, 128 * blocks, generator=torch.Generator().manual_seed(seed)) * size


@given(matrices)
def test_mxfp4_loses_no_more_than_half_a_step_of_each_value(made):
    weights = drawn(*made)
    codes, scales = to_mxfp4(weights)
    rows, columns = weights.shape
    assert (codes.shape, scales.shape) == ((rows, columns // 2), (rows, columns // 32))
    steps = (scales.float() - 127).exp2().repeat_interleave(32, 1)
    error = (from_mxfp4(codes, scales) - weights).abs()
    within = weights.abs() <= 6 * steps
    assert bool((error[within] <= steps[within]).all()), "the largest step is 2, from 4 to 6"
    assert bool((weights.abs() < 8 * steps).all()), "a group's largest value is below 8 scales, and becomes 6"
    again = to_mxfp4(from_mxfp4(codes, scales))
    assert torch.equal(from_mxfp4(*again), from_mxfp4(codes, scales))


@given(matrices)
def test_int4_loses_no_more_than_half_a_step_and_the_rounding_of_its_scale(made):
    weights = drawn(*made)
    codes, scales = to_int4(weights)
    rows, columns = weights.shape
    assert (codes.shape, scales.shape) == ((rows, columns // 2), (rows, columns // 128))
    steps = scales.float().repeat_interleave(128, 1)
    assert bool(((from_int4(codes, scales) - weights).abs() <= 0.54 * steps).all())


def test_groups_of_zeros_stay_zero_and_do_not_widen_the_range_of_the_scales():
    weights = torch.zeros(2, 128)
    weights[0, :32] = torch.linspace(-3, 3, 32)
    codes, scales = to_mxfp4(weights)
    assert not from_mxfp4(codes, scales)[:, 32:].any()
    assert scales.unique().numel() == 1


def test_the_order_of_the_halves_of_a_byte_is_that_of_flashinfers_own_quantizers():
    weights = drawn(1, 4, 2, 1.0)
    assert relative_error(from_mxfp4(*prepare._quantize_mxfp4_linear(weights)), weights) < 0.2
    codes, scales = prepare._quantize_int4_grouped(weights.unsqueeze(0))
    assert relative_error(from_int4(codes[0], scales[0]), weights) < 0.2


@pytest.mark.parametrize(
    "regime",
    [
        Regime(),
        Regime(ep_size=4, dispatch="allgather"),
        Regime(ep_size=8, attention_dp=True),
        Regime(ep_size=4, layout="pool"),
    ],
    ids=lambda regime: regime.slug,
)
@pytest.mark.parametrize(("fields", "options", "tolerance"), CASES.values(), ids=CASES)
def test_the_op_is_given_what_the_reference_computes(op, regime, fields, options, tolerance):
    """EP8 has two local experts of the four that a row has ids of."""
    layer, backend = small(**fields), FlashInferCutlassBackend(**options)
    assert backend.tolerance(layer) == tolerance
    runner = backend.prepare(problem(layer, regime, 8, rank=regime.ep_size - 1, draws=1))
    out, reference = runner.run(Tactic(gemm1=5, gemm2=60)), runner.reference()
    assert out.shape == reference.shape == (8, layer.hidden_size)
    assert 0 < relative_error(out, reference) <= tolerance
    assert op.calls[-1].profile_ids == [5, 60]


@pytest.mark.parametrize("left_out", ["fc1_expert_biases", "fc2_expert_biases", "swiglu_limit", "swiglu_beta"])
def test_a_missing_bias_or_clamp_is_seen(op, left_out):
    """So the test above fails if the op does not get one of them. A limit of 7 is met by few values of variance 1."""
    layer = small(precision="mxfp4", **WHOLE, **GPT_OSS)
    runner = FlashInferCutlassBackend().prepare(problem(layer, Regime(), 6, draws=1))
    if left_out == "swiglu_limit":
        runner._inputs *= 8
    reference = runner.reference()
    del runner._fixed[left_out]
    assert relative_error(runner.run(DEFAULT_TACTIC), reference) > 2 * FlashInferCutlassBackend().tolerance(layer)


@pytest.mark.parametrize(("fields", "options", "tolerance"), CASES.values(), ids=CASES)
def test_the_workspace_is_asked_for_with_the_sizes_and_the_kernels_of_the_call(op, fields, options, tolerance):
    layer = small(**fields)
    runner = FlashInferCutlassBackend(**options).prepare(problem(layer, Regime(ep_size=4), 3, draws=1))
    runner.run(DEFAULT_TACTIC)
    (call,), (asked,) = op.calls, op.sizes
    assert asked["hidden_size"] == call.input.shape[1] == call.fc2_expert_weights.shape[1]
    assert 2 * asked["intermediate_size"] == call.fc1_expert_weights.shape[1]
    assert (asked["x_dtype"], asked["weight_dtype"]) == (call.input.dtype, call.fc1_expert_weights.dtype)
    switches = [name for name in OP.parameters if name.startswith("use_")]
    assert {name: asked.get(name, OP.parameters[name].default) for name in switches} == {
        name: getattr(call, name) for name in switches
    }


def test_gpt_oss_is_padded_as_each_engine_pads_it():
    gpt_oss = preset("gpt-oss-120b")
    sizes = {
        caller: format_of(Precision.MXFP4, caller=caller).padded(gpt_oss.hidden_size, 2880)
        for caller in OPTIONS["caller"]
    }
    assert sizes == {"vllm": (2944, 2944), "sglang": (3072, 2944)}
    backend = FlashInferCutlassBackend()
    assert backend.unsupported(gpt_oss, Regime(ep_size=4)) is None
    assert backend.unsupported(gpt_oss, Regime(tp_size=2)) is None
    assert "multiples of 32" in (backend.unsupported(gpt_oss, Regime(tp_size=8)) or "")


def test_the_padding_of_rows_weights_and_biases_is_zero(op):
    layer = small(precision="mxfp4", **PADDED, **GPT_OSS)
    asked = problem(layer, Regime(ep_size=4), 3)
    experts = CutlassExperts(asked, format_of(Precision.MXFP4))
    expert = experts.expert(1)
    assert (experts.hidden, experts.intermediate) == (256, 128)
    up, gate = expert.w1.chunk(2)
    for half in (up, gate):
        assert not half[96:].any()
        assert not half[:, 160:].any()
        assert half[:96, :160].count_nonzero() > 0.8 * 96 * 160
    assert not expert.w2[160:].any()
    assert not expert.w2[:, 96:].any()
    assert not expert.b1.view(2, -1)[:, 96:].any()
    assert not expert.b2[160:].any()
    assert not FlashInferCutlassBackend().prepare(asked).arguments()["input"][:, 160:].any()


def test_rows_of_a_layer_with_the_weight_on_its_input_count_as_multiplied(op):
    llama4 = {"top_k": 1, "routing": {"scoring": "sigmoid", "renormalize": False}}
    layer = small(**llama4, weight_on_input=True)
    asked = problem(layer, Regime(ep_size=4), 8, draws=1)
    runner = FlashInferCutlassBackend().prepare(asked)
    assert 0 < relative_error(runner.run(DEFAULT_TACTIC), runner.reference()) < 1e-2
    assert torch.equal(op.calls[-1].token_final_scales, torch.ones(8, 1))
    plain = FlashInferCutlassBackend().prepare(problem(small(**llama4), Regime(ep_size=4), 8, draws=1))
    assert torch.equal(runner.inputs().x, plain.inputs().x), "the op gets the same rows"
    assert not torch.equal(plain.inputs().topk_weights, runner.inputs().topk_weights)


def test_rows_that_a_layer_writes_are_the_unpadded_part_of_what_the_op_reads(op):
    runner = FlashInferCutlassBackend().prepare(problem(small(precision="mxfp4", **PADDED), Regime(), 3))
    x = runner.inputs(1).x
    assert x.shape == (3, 160)
    x.fill_(1.0)
    assert torch.equal(runner.arguments(1)["input"][:, :160], torch.ones(3, 160, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("precision", "activations", "adapter"),
    [("mxfp4", "bf16", "CutlassW4A16Runner"), ("mxfp4", "fp8", "CutlassHummingRunner"),
     ("w4a8", "bf16", "CutlassW4A8Runner")],
)  # fmt: skip
def test_flashinfers_own_adapter_of_each_format_takes_these_tensors_and_gives_the_op_the_same_scales(
    op, precision, activations, adapter
):
    fmt = format_of(Precision(precision), mxfp4_activations=activations)
    experts = CutlassExperts(problem(small(precision=precision, **WHOLE), Regime(ep_size=4), 3), fmt)
    (w1, *_), (w2, *_) = experts.first, experts.second
    given = fmt.quant_scales(experts.first, experts.second, torch.ones(()))
    prepared = given
    if adapter == "CutlassHummingRunner":  # in another order, and the folded scales as bytes
        prepared = [experts.first[1], experts.second[1], given[1], given[4], given[2]]
    kind = getattr(runners, adapter)
    sizes = SimpleNamespace(
        routing=SimpleNamespace(num_experts=4),
        experts=SimpleNamespace(intermediate_size=128),
        activation=SimpleNamespace(is_gated=True),
    )
    instance = SimpleNamespace(
        config=sizes,
        _required_weight_keys=kind._required_weight_keys,
        _validate_weight_storage=lambda tensors: None,
    )
    view = dict(zip(kind._required_weight_keys, [w1, w2, *prepared], strict=True))
    packed = kind._pack_weight_inputs(instance, view, 128)
    theirs = kind._quant_scales(instance, [None] * 4 + packed)
    assert [(each.data_ptr(), each.nbytes) for each in theirs] == [(each.data_ptr(), each.nbytes) for each in given]


class Compiled:
    """FlashInfer's compiled module as its own `MoERunner` asks it: four kinds of tiles. The device lacks one."""

    TILES = ((64, 128), (128, 128), (64, 256), (256, 128))

    def __init__(self, counts=(4, 4)):
        self.made, self.asked = [], []
        self._counts = counts

    def init(self, *arguments):
        self.made.append(arguments)
        first, second = self._counts
        return SimpleNamespace(
            get_gemm1_tactic_count=lambda: first,
            get_gemm2_tactic_count=lambda: second,
            get_tactic_occupancy=lambda tactic: int(tactic % first != 1),
            get_valid_tactics_for_shape=self.valid,
        )

    def set_deepgemm_jit_include_dirs(self, paths):
        pass

    def interleave_moe_weights_for_sm90_mixed_gemm(self, *arguments):
        raise AssertionError("no weights are made for a list of tactics")

    def valid(self, stage, gemm_n, gemm_k):
        self.asked.append((stage, gemm_n, gemm_k))
        first, second = self._counts
        numbers = range(first) if stage == 1 else range(first, first + second)
        return [
            number for number in numbers
            if gemm_n % self.TILES[number % first % 4][0] == 0 and gemm_k % self.TILES[number % first % 4][1] == 0
        ]  # fmt: skip


def pairs(found):
    return {(tactic["gemm1"], tactic["gemm2"]) for tactic in found.tactics[1:]}


REAL_MODULE = core.get_cutlass_fused_moe_module.__wrapped__


def from_real_runner(monkeypatch, planted, layer, regime, **options):
    """The candidates that the backend finds with FlashInfer's own `MoERunner` over a planted module."""
    spec = SimpleNamespace(build_and_load=lambda: planted)
    monkeypatch.setattr(core, "gen_cutlass_fused_moe_sm90_module", lambda *_: spec)
    module = REAL_MODULE("90")
    monkeypatch.setattr(core, "get_cutlass_fused_moe_module", lambda arch: module)
    return FlashInferCutlassBackend(**options).candidates(layer, regime, 16, "cuda")


@pytest.mark.parametrize("counts", [(4, 4), (8, 12)])
def test_the_tactics_are_those_of_flashinfers_own_runner_whose_tiles_divide_the_padded_sizes(op, monkeypatch, counts):
    planted = Compiled(counts)
    found = from_real_runner(monkeypatch, planted, small(precision="mxfp4", **PADDED), Regime(ep_size=4))
    assert planted.asked == [(1, 256, 256), (2, 256, 128)], "N and K of both GEMMs, padded"
    first = {number for number in range(counts[0]) if number % counts[0] != 1}
    second = {
        number for number in range(counts[0], sum(counts))
        if number % counts[0] != 1 and number % counts[0] % 4 != 2
    }  # fmt: skip
    assert pairs(found) == {(a, b) for a in first for b in second}
    assert found.tactics[0] == DEFAULT_TACTIC
    assert {tactic for tactic in found.excluded if "gemm2" in tactic} == {
        Tactic(gemm2=number) for number in set(range(counts[0], sum(counts))) - second
    }
    assert all("divide" in reason for reason in found.excluded.values())


def test_the_kernels_have_other_tactics_for_the_padding_of_another_engine(op, monkeypatch):
    gpt_oss, regime, asked = preset("gpt-oss-120b"), Regime(ep_size=4), {}
    for caller in OPTIONS["caller"]:
        planted = Compiled()
        from_real_runner(monkeypatch, planted, gpt_oss, regime, caller=caller)
        asked[caller] = planted.asked
    assert asked == {
        "vllm": [(1, 5888, 2944), (2, 2944, 2944)],
        "sglang": [(1, 5888, 3072), (2, 3072, 2944)],
    }


@pytest.mark.parametrize(
    ("precision", "options", "on"),
    [
        ("mxfp4", {}, {"use_w4_group_scaling"}),
        ("mxfp4", {"mxfp4_activations": "fp8"}, {"use_w4_group_scaling", "use_wfp4afp8_humming"}),
        ("w4a8", {}, {"use_w4_group_scaling", "use_packed_weights"}),
    ],
)
def test_the_runner_is_made_with_the_switches_that_select_the_kernels(op, precision, options, on):
    FlashInferCutlassBackend(**options).candidates(small(precision=precision, **WHOLE), Regime(ep_size=4), 16, "cuda")
    (made,) = FakeRunner.made
    assert (made["x_dtype"], made["weight_dtype"], made["output_dtype"]) == (
        torch.bfloat16, torch.uint8, torch.bfloat16,
    )  # fmt: skip
    assert {name for name in made if name.startswith("use_") and made[name]} == {*on, "use_fused_finalize"}


def test_sglang_adds_up_a_rows_slots_in_another_kernel_so_there_are_other_tactics(op):
    asked = small(), Regime(ep_size=4), 16, "cuda"
    for caller in OPTIONS["caller"]:
        FlashInferCutlassBackend(caller=caller).candidates(*asked)
    assert [made["use_fused_finalize"] for made in FakeRunner.made] == [True, False]
    runner = FlashInferCutlassBackend(caller="sglang").prepare(problem(small(), Regime(), 3, draws=1))
    runner.run(DEFAULT_TACTIC)
    assert op.calls[-1].use_fused_finalize is op.sizes[-1]["use_fused_finalize"] is False


def test_a_flashinfer_without_a_switch_is_refused_and_does_not_run_other_kernels(op, monkeypatch):
    class Older(FakeRunner):
        def __init__(self, x_dtype, weight_dtype, output_dtype, use_w4_group_scaling, use_packed_weights):
            raise AssertionError("other kernels would be listed")

    monkeypatch.setattr(core, "get_cutlass_fused_moe_module", lambda arch: SimpleNamespace(MoERunner=Older))
    backend = FlashInferCutlassBackend(mxfp4_activations="fp8")
    with pytest.raises(UnsupportedError, match="no use_wfp4afp8_humming"):
        backend.candidates(small(precision="mxfp4", **WHOLE), Regime(), 16, "cuda")


def test_mixed_input_needs_hopper_and_bf16_does_not(op, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    with pytest.raises(UnsupportedError, match=r"mixed input need compute capability 9\.0"):
        FlashInferCutlassBackend().prepare(problem(small(precision="mxfp4", **WHOLE), Regime(), 3))
    assert FlashInferCutlassBackend().prepare(problem(small(), Regime(), 3))


def test_options_are_fields_of_the_environment_only_where_they_differ_from_the_default(op):
    assert set(FlashInferCutlassBackend().environment()) == {"flashinfer"}
    made = FlashInferCutlassBackend(mxfp4_activations="fp8", caller="sglang")
    fields = made.environment()
    assert fields == FlashInferCutlassBackend().environment() | {"mxfp4_activations": "fp8", "caller": "sglang"}
    again = registry.of_environment("flashinfer-cutlass", fields)
    assert again.environment() == pickle.loads(pickle.dumps(made)).environment() == fields


@pytest.mark.parametrize("option", OPTIONS)
def test_an_unknown_value_of_an_option_names_those_that_are_allowed(option):
    with pytest.raises(UsageError, match=f"{option} must be one of {', '.join(OPTIONS[option])}; given"):
        FlashInferCutlassBackend(**{option: "fp7"})


def test_every_format_says_what_the_op_needs():
    for fmt in FORMATS.values():
        assert OP.parameters.keys() >= fmt.flags.keys()
        assert fmt.inner_multiple % fmt.multiple == 0 or fmt.inner_multiple == 1
        assert fmt().mixed == bool(fmt.flags)
