"""`cutlass_fused_moe` and its runner without a GPU: planted ones with the installed FlashInfer's signatures.

The op computes by its documented meaning on the CPU, one row after the other, and checks its arguments as the compiled
binding does (`flashinfer_cutlass_fused_moe_binding.cu`).
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer.fused_moe")
from flashinfer.fused_moe import core, prepare  # noqa: E402

from moetune.backends.base import Problem  # noqa: E402
from moetune.backends.flashinfer_cutlass import op as op_module  # noqa: E402
from moetune.spec.layer import MoELayer  # noqa: E402
from moetune.workload.draws import as_draws  # noqa: E402
from moetune.workload.routing import realize  # noqa: E402

OP = inspect.signature(flashinfer.cutlass_fused_moe)
WORKSPACE = inspect.signature(core.cutlass_fused_moe_workspace_size)
RUNNER_FIELDS = {
    "x_dtype", "weight_dtype", "output_dtype", "top_k", "tp_size", "tp_rank", "ep_size", "ep_rank", "cluster_size",
    "cluster_rank", "enable_alltoall", "use_deepseek_fp8_block_scale", "use_w4_group_scaling", "use_mxfp8_act_scaling",
    "min_latency_mode", "enable_pdl", "activation_type", "use_packed_weights", "use_fused_finalize",
    "use_wfp4afp8_humming",
}  # fmt: skip
FIRST, BOTH = 45, 126
TOO_BIG = {7, 50}
MARKS = {"fp4": 0x5A, "fp4_fp8": 0x69, "int4": 0x3C}
"""What the planted interleaving changes in each byte of a kind of weights, so that no other kind can be read."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
E4M3 = torch.float8_e4m3fn


class FakeRunner:
    """FlashInfer's `MoERunner` as far as it is asked: strict about its arguments, two tactics do not fit the device."""

    made: list[dict] = []

    def __init__(
        self, x_dtype, weight_dtype, output_dtype, top_k, tp_size, tp_rank, ep_size, ep_rank, cluster_size,
        cluster_rank, enable_alltoall, use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
        min_latency_mode, enable_pdl, activation_type, use_packed_weights, use_fused_finalize, use_wfp4afp8_humming,
    ):  # fmt: skip
        FakeRunner.made.append({name: value for name, value in locals().items() if name != "self"})
        counts = {"get_gemm1_tactic_count": lambda: FIRST, "get_gemm2_tactic_count": lambda: BOTH - FIRST}
        self.fused_moe_runner = SimpleNamespace(**counts)
        self.gemm_idx_for_tuning = None

    def get_valid_tactics(self, inputs, profile):
        stage = {1: range(FIRST), 2: range(FIRST, BOTH)}[self.gemm_idx_for_tuning]
        return [tactic for tactic in stage if tactic not in TOO_BIG]


class FakeOp:
    """`cutlass_fused_moe`; keeps the arguments of every call."""

    def __init__(self):
        self.calls = []
        self.sizes = []
        self.__signature__ = OP

    def __call__(self, *args, **kwargs):
        bound = OP.bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        self.calls.append(call)
        (w1, rounded1), (w2, rounded2) = weights_of(call)
        check_biases(call, w1, w2)
        out = torch.zeros(len(call.input), w2.shape[1])
        for row in range(len(out)):
            x = rounded1(call.input[row].float())
            for expert, weight in zip(call.token_selected_experts[row], call.token_final_scales[row], strict=True):
                local = int(expert) - call.ep_rank * len(w1)
                if 0 <= local < len(w1):
                    middle = rounded2(activated(call, local, w1[local] @ x))
                    bias = 0.0 if call.fc2_expert_biases is None else call.fc2_expert_biases[local].float()
                    out[row] += weight * (w2[local] @ middle + bias)
        call.output.copy_(out)
        return [call.output]


def activated(call, local, projected):
    """GEMM1's output of one slot and one expert, the up half before the gate half, after the activation."""
    if call.fc1_expert_biases is not None:
        projected = projected + call.fc1_expert_biases[local].float()
    up, gate = projected.chunk(2)
    if int(call.activation_type) == 8:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert int(call.activation_type) == 3
    alpha, beta, limit = (
        default if tensor is None else float(tensor[local])
        for tensor, default in ((call.swiglu_alpha, 1.0), (call.swiglu_beta, 0.0), (call.swiglu_limit, torch.inf))
    )
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + beta)


def weights_of(call):
    """The numbers of each GEMM's weights `[L, N, K]`, and the function that rounds what they are multiplied with."""
    stored = call.fc1_expert_weights, call.fc2_expert_weights
    if call.use_w4_group_scaling:
        assert call.input.dtype == torch.bfloat16
        assert all(each.dtype == torch.uint8 and each.is_contiguous() for each in stored)
        assert stored[0].shape[1] == 2 * 2 * stored[1].shape[2]
        return int4(call, stored) if call.use_packed_weights else mxfp4(call, stored)
    assert not call.use_packed_weights
    assert stored[0].dtype == stored[1].dtype == call.input.dtype
    w1, w2 = (each.float() for each in stored)
    if call.input.dtype == torch.bfloat16:
        assert call.quant_scales == []
        return (w1, lambda x: x), (w2, lambda x: x)
    dequant1, quant, dequant2, input_scale = call.quant_scales
    assert dequant1.shape == dequant2.shape == (len(w1),)
    assert quant.shape == input_scale.shape == ()
    return (w1 * dequant1[:, None, None], lambda x: x), (
        w2 * dequant2[:, None, None],
        lambda x: (x * quant).to(E4M3).float(),
    )


def mxfp4(call, stored):
    if call.use_wfp4afp8_humming:
        folded1, experts1, reserved, folded2, experts2 = call.quant_scales
        assert folded1.dtype == folded2.dtype == torch.int32
        assert experts1.shape == experts2.shape == (len(stored[0]),)
        assert reserved.shape == ()
        made = []
        for codes, folded, experts in zip(stored, (folded1, folded2), (experts1, experts2), strict=True):
            assert folded.shape[1:] == (codes.shape[1] // 64, codes.shape[2] // 64, 16, 4)
            # the kernel makes e4m3 numbers whose exponents lack a bias of 6, and the experts' scales have it
            factors = unfolded(folded.view(torch.uint8), 32).float().exp2() / 64
            made.append(e2m1(codes ^ MARKS["fp4_fp8"]) * factors.repeat_interleave(32, -1) * experts[:, None, None])
        return (made[0], per_row), (made[1], per_row)
    numbers = [
        e2m1(codes ^ MARKS["fp4"]) * (unfolded(folded, 32).float() - 127).exp2().repeat_interleave(32, -1)
        for codes, folded in zip(stored, call.quant_scales, strict=True)
    ]
    return (numbers[0], lambda x: x), (numbers[1], lambda x: x.bfloat16().float())


def int4(call, stored):
    assert not call.use_wfp4afp8_humming
    scales1, scales2, columns1, columns2, zero1, zero2, experts1, experts2 = call.quant_scales
    assert columns1.numel() == call.input.shape[1]
    assert columns2.numel() == 2 * stored[1].shape[2]
    assert zero1.numel() == zero2.numel() == 0
    made = []
    for codes, folded, columns, experts in (
        (stored[0], scales1, columns1, experts1),
        (stored[1], scales2, columns2, experts2),
    ):
        assert folded.dtype == columns.dtype == torch.bfloat16
        numbers = nibbles(codes ^ MARKS["int4"]).float()
        numbers = torch.where(numbers > 7, numbers - 16, numbers) * unfolded(folded, 128).repeat_interleave(128, -1)
        made.append((numbers * experts[:, None, None], lambda x, by=columns: (x * by).to(E4M3).float()))
    return made


def check_biases(call, w1, w2):
    for bias, weights in ((call.fc1_expert_biases, w1), (call.fc2_expert_biases, w2)):
        assert bias is None or (bias.dtype, bias.shape) == (torch.bfloat16, weights.shape[:2])
    for constant in (call.swiglu_alpha, call.swiglu_beta, call.swiglu_limit):
        assert constant is None or (constant.dtype, constant.shape) == (torch.float32, (len(w1),))


def per_row(x):
    factor = 448 / x.abs().max()
    return (x * factor).to(E4M3).float() / factor


def nibbles(codes):
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def e2m1(codes):
    return E2M1[nibbles(codes).long()]


def unfolded(folded, group):
    """The scales `[L, N, K/group]` of which `interleave_moe_scales_for_sm90_mixed_gemm` made `folded`."""
    experts, blocks, columns, folded_rows, width = folded.shape
    groups = 128 // group
    parts = folded.reshape(experts, blocks, columns, folded_rows, width // groups, groups)
    return parts.permute(0, 1, 4, 3, 2, 5).reshape(experts, blocks * 64, columns * groups)


def interleaved(weight, quant_type="fp4"):
    """In the place of the compiled interleaving: it checks what that checks, and changes the bytes by `MARKS`."""
    assert weight.dtype == torch.uint8
    assert weight.is_contiguous()
    assert weight.shape[1] % 16 == 0
    assert weight.shape[2] % 32 == 0
    return weight ^ MARKS[quant_type]


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says that it is on a GPU, for FlashInfer's Python code."""

    is_cuda = True


def preprocessed(real):
    """FlashInfer's own preparation of mxfp4 for e4m3 activations, on the CPU."""

    def function(weight, raw_scale):
        made = real(weight.as_subclass(OnGpu), raw_scale.as_subclass(OnGpu))
        return tuple(tensor.as_subclass(torch.Tensor) for tensor in made)

    return function


def plant(monkeypatch):
    """Plants a machine with a Hopper GPU, as far as the backend asks; tensors stay on the CPU. Returns the op."""
    fake = FakeOp()

    def workspace_size(*args, **kwargs):
        fake.sizes.append(WORKSPACE.bind(*args, **kwargs).arguments)
        return 64

    FakeRunner.made.clear()
    humming = "preprocess_moe_weights_for_sm90_mixed_gemm_humming"
    monkeypatch.setattr(flashinfer, "cutlass_fused_moe", fake)
    monkeypatch.setattr(flashinfer, "interleave_moe_weights_for_sm90_mixed_gemm", interleaved)
    monkeypatch.setattr(prepare, "interleave_moe_weights_for_sm90_mixed_gemm", interleaved)
    monkeypatch.setattr(flashinfer, humming, preprocessed(getattr(prepare, humming)))
    monkeypatch.setattr(core, "cutlass_fused_moe_workspace_size", workspace_size)
    monkeypatch.setattr(
        core, "get_cutlass_fused_moe_module", lambda arch: SimpleNamespace(MoERunner={"90": FakeRunner}[arch])
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(op_module, "unbuilt", lambda module: None)
    return fake


def small(**fields):
    return MoELayer(**{"num_experts": 16, "top_k": 4, "hidden_size": 64, "intermediate_size": 32, **fields})


def problem(layer, regime, rows, rank=0, draws=2):
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings))


def relative_error(result, reference):
    return float((result.float() - reference).norm() / reference.norm())
