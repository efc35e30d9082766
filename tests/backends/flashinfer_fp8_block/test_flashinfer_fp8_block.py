"""The rival of FlashInfer's fp8 blocks against the installed FlashInfer's signatures, with the kernels faked."""

import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer.fused_moe")
pytest.importorskip("triton")
from flashinfer.fused_moe import core  # noqa: E402

from moetune.backends import registry  # noqa: E402
from moetune.backends.base import FillableRunner, Problem  # noqa: E402
from moetune.backends.flashinfer_cutlass import op as op_module  # noqa: E402
from moetune.backends.flashinfer_fp8_block.backend import FlashInferFp8BlockBackend  # noqa: E402
from moetune.backends.grouped_triton.quantize import quantize_rows_reference  # noqa: E402
from moetune.backends.reference import relative_error  # noqa: E402
from moetune.backends.rival import ONLY_TACTIC  # noqa: E402
from moetune.errors import UnsupportedError  # noqa: E402
from moetune.inputs.presets import layer as preset  # noqa: E402
from moetune.spec.layer import MoELayer  # noqa: E402
from moetune.spec.regime import Regime  # noqa: E402
from moetune.workload.draws import as_draws  # noqa: E402
from moetune.workload.routing import realize  # noqa: E402

OP = inspect.signature(flashinfer.cutlass_fused_moe)
WORKSPACE = inspect.signature(core.cutlass_fused_moe_workspace_size)
GROUP = 128


def rounded(rows):
    """The rows as the kernels read them: e4m3 with a scale for each 128 values."""
    quantized, scales = quantize_rows_reference(rows.bfloat16())
    return quantized.float() * scales.repeat_interleave(GROUP, -1)


def dequantized(values, scales):
    return values.float() * scales.repeat_interleave(GROUP, -1).repeat_interleave(GROUP, -2)


class FakeOp:
    """`cutlass_fused_moe` with fp8 blocks by its documented meaning, in fp32 on the CPU; keeps the calls."""

    def __init__(self):
        self.calls, self.sizes = [], []
        self.__signature__ = OP

    def __call__(self, *args, **kwargs):
        bound = OP.bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        self.calls.append(call)
        assert call.use_deepseek_fp8_block_scale
        assert call.input.dtype == torch.bfloat16
        assert call.fc1_expert_weights.dtype == call.fc2_expert_weights.dtype == torch.float8_e4m3fn
        w1, w2 = (dequantized(*each) for each in zip(
            (call.fc1_expert_weights, call.fc2_expert_weights), call.quant_scales, strict=True))  # fmt: skip
        x, out = rounded(call.input), torch.zeros(call.input.shape)
        for row in range(len(x)):
            for expert, weight in zip(call.token_selected_experts[row], call.token_final_scales[row], strict=True):
                local = int(expert) - call.ep_rank * len(w1)
                if 0 <= local < len(w1):
                    up, gate = (w1[local] @ x[row]).chunk(2)
                    middle = torch.nn.functional.silu(gate) * up
                    if int(call.activation_type) != 3:
                        middle = torch.nn.functional.gelu(gate, approximate="tanh") * up
                    out[row] += weight * (w2[local] @ rounded(middle[None])[0])
        call.output.copy_(out)
        return call.output


@pytest.fixture
def op(monkeypatch):
    """A machine with a Hopper GPU and nvcc, as far as the backend asks; tensors stay on the CPU."""
    fake = FakeOp()

    def workspace_size(*args, **kwargs):
        fake.sizes.append(WORKSPACE.bind(*args, **kwargs).arguments)
        return 64

    monkeypatch.setattr(flashinfer, "cutlass_fused_moe", fake)
    monkeypatch.setattr(core, "cutlass_fused_moe_workspace_size", workspace_size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(op_module, "unbuilt", lambda module: None)
    monkeypatch.setenv("TRTLLM_DG_ENABLED", "0")
    return fake


def small(**fields):
    sizes = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "intermediate_size": 128, "precision": "fp8_block"}
    return MoELayer(**{**sizes, **fields})


def problem(layer, regime, rows, rank=0, draws=2):
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings))


def test_it_is_a_rival_with_one_candidate_that_survives_a_pickle():
    backend = pickle.loads(pickle.dumps(FlashInferFp8BlockBackend()))
    assert backend.rival
    assert backend.candidates(small(), Regime(), 16, "cuda").tactics == (ONLY_TACTIC,)
    assert backend.default(small(), Regime(), 16) == ONLY_TACTIC


@pytest.mark.parametrize(
    ("fields", "regime", "reason"),
    [
        ({"precision": "bf16"}, Regime(), "not bf16"),
        ({"precision": "fp8_tensor"}, Regime(), "not fp8_tensor"),
        ({"activation": "swiglu_clamped"}, Regime(), "swiglu_clamped"),
        ({"expert_bias": True}, Regime(), "bias"),
        ({"weight_on_input": True}, Regime(), "input"),
        ({"intermediate_size": 192}, Regime(), "128"),
        ({}, Regime(tp_size=2), "128"),
        ({}, Regime(ep_size=3, uneven_shards=True), "equal"),
        ({}, Regime(ep_size=4, attention_dp=True, layout="batched"), "batched"),
    ],
)
def test_each_thing_that_it_does_not_compute_has_a_reason_of_its_own(fields, regime, reason):
    assert reason in (FlashInferFp8BlockBackend().unsupported(small(**fields), regime) or "")


def test_no_command_prefers_it_to_a_backend_that_tunes():
    layer, regime = preset("deepseek-r1"), Regime(ep_size=8)
    assert FlashInferFp8BlockBackend().unsupported(layer, regime) is None
    assert "flashinfer-fp8-block" not in registry.backends_computing(layer, regime)
    assert "flashinfer-fp8-block" not in registry.able(layer, regime)[1]
    assert registry.preferred(layer, regime).name != "flashinfer-fp8-block"


@pytest.mark.parametrize(
    "regime",
    [
        Regime(),
        Regime(ep_size=4),
        Regime(ep_size=4, dispatch="allgather"),
        Regime(ep_size=4, layout="deduplicated"),
        Regime(ep_size=4, layout="slot"),
        Regime(ep_size=4, layout="pool"),
        Regime(ep_size=8, attention_dp=True),
    ],
    ids=lambda regime: regime.slug,
)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_op_is_given_what_the_reference_computes(op, regime, activation):
    layer, backend = small(activation=activation), FlashInferFp8BlockBackend()
    rank = regime.ep_size - 1
    runner = backend.prepare(problem(layer, regime, 12, rank))
    for draw in (0, 1):
        out = runner.run(ONLY_TACTIC, draw)
        assert 0 < relative_error(out, runner.reference(draw)) <= backend.tolerance(layer)
        assert (op.calls[-1].ep_size, op.calls[-1].ep_rank) == (regime.ep_size, rank)
        assert op.calls[-1].profile_ids is None


def test_ids_reach_the_op_global_and_the_workspace_is_for_fp8_blocks(op):
    asked = problem(small(), Regime(ep_size=4, layout="pool"), 12, rank=2)
    FlashInferFp8BlockBackend().prepare(asked).run(ONLY_TACTIC, 1)
    assert torch.equal(op.calls[-1].token_selected_experts, asked.draws[1].routing.topk_ids)
    assert (op.calls[-1].token_selected_experts == -1).any()
    assert op.calls[-1].workspace_buffer.dtype == torch.uint8
    (asked_size,) = op.sizes
    assert asked_size["use_deepseek_fp8_block_scale"]
    assert (asked_size["max_num_tokens"], asked_size["num_experts_total"], asked_size["top_k"]) == (12, 16, 4)
    assert (asked_size["x_dtype"], asked_size["weight_dtype"]) == (torch.bfloat16, torch.float8_e4m3fn)


def test_a_preparation_runs_the_kernels_on_each_draw_so_that_they_are_compiled_before_a_run_is_timed(op):
    FlashInferFp8BlockBackend().prepare(problem(small(), Regime(), 4, draws=3))
    assert [call.token_selected_experts.data_ptr() for call in op.calls] == list(
        dict.fromkeys(call.token_selected_experts.data_ptr() for call in op.calls)
    )
    assert len(op.calls) == 3


def test_its_inputs_can_be_overwritten(op):
    runner = FlashInferFp8BlockBackend().prepare(problem(small(), Regime(), 4, draws=1))
    assert isinstance(runner, FillableRunner)
    runner.inputs().x.zero_()
    assert not runner.run(ONLY_TACTIC).any()
    assert not runner.reference().any()


def test_without_nvcc_the_lack_is_named_unless_the_kernels_are_built_in(op, monkeypatch, tmp_path):
    backend = FlashInferFp8BlockBackend()
    assert backend.unavailable() is None
    assert backend.environment()["block_kernels"] == "cutlass"
    for name in ("TRTLLM_DG_ENABLED", "TRTLLM_DG_NVCC_COMPILER", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason, hint = backend.unavailable()
    assert "nvcc is missing" in reason
    assert "TRTLLM_DG_NVCC_COMPILER" in hint
    with pytest.raises(UnsupportedError, match="nvcc"):
        backend.prepare(problem(small(), Regime(), 4))
    assert backend.environment()["block_kernels"] == "deep_gemm"
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert backend.unavailable() is None


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_on_another_gpu_than_hopper_the_reason_names_the_needed_capability(op, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason, _ = FlashInferFp8BlockBackend().unavailable()
    assert "9.0" in reason
    assert f"{capability[0]}.{capability[1]}" in reason


def test_what_decides_over_the_compiler_is_read_by_the_installed_flashinfer():
    """Else the lack of a compiler is claimed where FlashInfer would look elsewhere."""
    from flashinfer.jit import env

    kernels = env.FLASHINFER_CSRC_DIR / "nv_internal/tensorrt_llm"
    compiler = (kernels / "deep_gemm/compiler.cuh").read_text()
    assert all(f'getenv("{name}")' in compiler for name in ("TRTLLM_DG_NVCC_COMPILER", "CUDA_HOME"))
    dispatch = kernels / "kernels/cutlass_kernels/fp8_blockscale_gemm/fp8_blockscale_gemm_kernel.cuh"
    assert 'getenv("TRTLLM_DG_ENABLED")' in dispatch.read_text()
