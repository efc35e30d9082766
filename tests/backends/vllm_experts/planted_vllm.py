"""A package `vllm` with as much of vLLM 0.26 … 0.33 as the rivals call, computed in torch on the CPU.

Signatures are vLLM's; `test_vllm_sources.py` compares them with the wheels. A call that vLLM would refuse fails here.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch

BLOCK = 128


class MoEActivation(enum.Enum):
    SILU = "silu"


class RoutingMethodType(enum.IntEnum):
    TopK = 5


class FusedMoEParallelConfig:
    @classmethod
    def make_no_parallel(cls):
        return cls()


@dataclass
class FusedMoEConfig:
    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size: int
    num_local_experts: int
    num_logical_experts: int
    activation: MoEActivation
    device: torch.device
    routing_method: RoutingMethodType
    moe_parallel_config: FusedMoEParallelConfig
    in_dtype: torch.dtype
    max_num_tokens: int = 8192


def fp8_w8a8_moe_quant_config(
    w1_scale, w2_scale, a1_scale=None, a2_scale=None, per_act_token_quant=False, per_out_ch_quant=False,
    block_shape=None,
):  # fmt: skip
    return SimpleNamespace(**locals(), quant_dtype=torch.float8_e4m3fn)


def moe_kernel_quantize_input(A, A_scale, quant_dtype, per_act_token_quant, block_shape=None):
    assert quant_dtype == torch.float8_e4m3fn
    assert A.dtype == torch.bfloat16
    x = A.float()
    if block_shape is not None:
        groups = x.unflatten(-1, (-1, BLOCK))
        scales = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1).clamp(min=1e-10) / 448)))
        return (groups / scales.unsqueeze(-1)).flatten(-2).to(quant_dtype), scales
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448 if per_act_token_quant else A_scale
    assert scales is not None
    return (x / scales).clamp(-448, 448).to(quant_dtype), scales


def prepare_fp8_moe_layer_for_deepgemm(w13, w2, w13_scale, w2_scale, block_shape):
    assert block_shape == (BLOCK, BLOCK)
    for scales in (w13_scale, w2_scale):
        assert torch.equal(torch.exp2(torch.log2(scales).round()), scales), "another scale would change the weights"
    return w13, w2, w13_scale.clone(), w2_scale.clone()


class _Experts:
    """What both classes share: the layer in fp32, from the values and scales that they get."""

    made: list[_Experts] = []

    def __init__(self, moe_config, quant_config):
        self.moe_config, self.quant_config, self.calls = moe_config, quant_config, []
        _Experts.made.append(self)

    def rows(self, values, scales):
        """The rows in fp32."""
        raise NotImplementedError

    def weights(self, values, scales):
        """The weights of all local experts in fp32."""
        raise NotImplementedError

    def workspace_dtype(self, act_dtype):
        return act_dtype

    def workspace_shapes(self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation):
        assert self.moe_config.intermediate_size * 2 == N
        assert self.moe_config.hidden_dim == K
        return (M * topk, max(N, K)), (M * topk, max(N // 2, K)), (M, K)

    def apply(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
        a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
    ):  # fmt: skip
        self.calls.append(SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"}))
        assert activation is MoEActivation.SILU
        assert expert_tokens_meta is None
        assert not apply_router_weight_on_input
        assert hidden_states.dtype == w1.dtype == w2.dtype == torch.float8_e4m3fn
        assert topk_ids.dtype == torch.int32
        x, config = self.rows(hidden_states, a1q_scale), self.quant_config
        first, second = self.weights(w1, config.w1_scale), self.weights(w2, config.w2_scale)
        output.zero_()
        total = torch.zeros(output.shape)
        for row in range(len(x)):
            for expert, weight in zip(topk_ids[row].tolist(), topk_weights[row], strict=True):
                local = expert if expert_map is None or expert < 0 else int(expert_map[expert])
                if local >= 0:
                    gate, up = (first[local] @ x[row]).chunk(2)
                    middle = (torch.nn.functional.silu(gate) * up).bfloat16().unsqueeze(0)
                    quant = (config.quant_dtype, config.per_act_token_quant, config.block_shape)
                    middle = self.rows(*moe_kernel_quantize_input(middle, a2_scale, *quant))
                    total[row] += weight * (second[local] @ middle[0])
        output.copy_(total)


class DeepGemmExperts(_Experts):
    def __init__(self, moe_config, quant_config):
        super().__init__(moe_config=moe_config, quant_config=quant_config)
        assert quant_config.block_shape == [BLOCK, BLOCK]
        assert quant_config.a2_scale is None

    def rows(self, values, scales):
        return values.float() * scales.repeat_interleave(BLOCK, -1)

    def weights(self, values, scales):
        return values.float() * scales.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)


@dataclass
class ExpertTokensMetadata:
    expert_num_tokens: torch.Tensor
    expert_num_tokens_cpu: torch.Tensor | None


class BatchedDeepGemmExperts(DeepGemmExperts):
    def __init__(self, moe_config, quant_config, max_num_tokens, num_dispatchers):
        super().__init__(moe_config=moe_config, quant_config=quant_config)
        self.capacity, self.expected = max_num_tokens * num_dispatchers, []

    def workspace_shapes(self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation):
        rows = (local_num_experts, self.capacity)
        return (*rows, max(N, K)), (*rows, N // 2), (*rows, K)

    def estimate_expected_m(self, global_num_experts, max_tokens_per_expert, topk):
        raise AssertionError("vLLM would take the capacity, because there is no step of an engine")

    def apply(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
        a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
    ):  # fmt: skip
        self.calls.append(SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"}))
        assert hidden_states.shape == output.shape == (len(w1), self.capacity, w1.shape[2])
        assert workspace13.numel() >= len(w1) * self.capacity * w1.shape[1]
        assert topk_ids.dim() == 2
        assert a1q_scale.stride(1) == 1, "DeepGEMM would copy the scales first"
        self.expected.append(self.estimate_expected_m(
            global_num_experts=global_num_experts, max_tokens_per_expert=self.capacity, topk=topk_ids.size(-1)
        ))  # fmt: skip
        counts = expert_tokens_meta.expert_num_tokens
        assert counts.dtype == torch.int32
        x, config = self.rows(hidden_states, a1q_scale), self.quant_config
        first, second = self.weights(w1, config.w1_scale), self.weights(w2, config.w2_scale)
        output.fill_(torch.nan)
        for expert, count in enumerate(counts.tolist()):
            if count:
                gate, up = (x[expert, :count] @ first[expert].T).chunk(2, dim=-1)
                middle = (torch.nn.functional.silu(gate) * up).bfloat16()
                quantized = moe_kernel_quantize_input(middle, None, config.quant_dtype, False, config.block_shape)
                output[expert, :count] = (self.rows(*quantized) @ second[expert].T).to(output.dtype)


class CutlassExpertsFp8(_Experts):
    def __init__(self, moe_config, quant_config, max_num_tokens=None, num_dispatchers=None):
        super().__init__(moe_config=moe_config, quant_config=quant_config)
        assert quant_config.block_shape is None

    def rows(self, values, scales):
        assert scales.dim() == 0 or len(scales) in (1, len(values))
        return values.float() * scales

    def weights(self, values, scales):
        assert scales.dim() == 1 or scales.shape[1] in (1, values.shape[1])
        return values.float() * scales.reshape(len(values), -1, 1)


def plant(monkeypatch, folder):
    """Makes this package the installed vLLM, with DeepGEMM in it."""
    fused_moe, quantization = "vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers.quantization.utils"
    members = {
        f"{fused_moe}.config": (
            FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType, fp8_w8a8_moe_quant_config,
        ),
        f"{fused_moe}.activation": (MoEActivation,),
        f"{fused_moe}.utils": (moe_kernel_quantize_input,),
        f"{fused_moe}.modular_kernel": (ExpertTokensMetadata,),
        f"{fused_moe}.experts.batched_deep_gemm_moe": (BatchedDeepGemmExperts,),
        f"{fused_moe}.experts.deep_gemm_moe": (DeepGemmExperts,),
        f"{fused_moe}.experts.cutlass_moe": (CutlassExpertsFp8,),
        f"{quantization}.fp8_utils": (prepare_fp8_moe_layer_for_deepgemm,),
    }  # fmt: skip
    for name, definitions in members.items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            if path not in sys.modules or path == name:
                module = ModuleType(path)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
        for definition in definitions:
            setattr(sys.modules[name], definition.__name__, definition)
    experts = folder / "vllm/model_executor/layers/fused_moe/experts"
    experts.mkdir(parents=True)
    for module in ("deep_gemm_moe", "batched_deep_gemm_moe", "cutlass_moe"):
        (experts / f"{module}.py").touch()
    (folder / "vllm/third_party/deep_gemm").mkdir(parents=True)
    _Experts.made.clear()
    return _Experts.made
