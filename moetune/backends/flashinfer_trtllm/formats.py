"""Describes each weight format of the trtllm-gen kernels by one class.

Source: FlashInfer 0.7.2.post1: `fused_moe/core.py`, `fused_moe/prepare.py` and
`csrc/trtllm_fused_moe_kernel_launcher.cu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from moetune.backends.flashinfer_trtllm import grids
from moetune.backends.flashinfer_trtllm.activations import (
    BF16,
    E4M3,
    FP8_BLOCK,
    FP8_TENSOR,
    MXFP8,
    NVFP4,
    dtype_number,
)
from moetune.backends.flashinfer_trtllm.weight_format import BLOCK_MAJOR_K, CLAMP, MAJOR_K, WEIGHTS, Expert, Format
from moetune.spec.enums import Precision

if TYPE_CHECKING:
    import torch

Fp8BlockLayout = Literal["blocked", "plain"]
"""The layout of DeepSeek's e4m3 experts: shuffled and blocked along K (vLLM), or as in the checkpoint (SGLang).

Each layout has kernels and tactics of its own, so a tactic of one is not a tactic of the other.
"""


class Bf16(Format):
    """Describes bf16 weights, blocked along K."""

    op = "trtllm_bf16_moe"
    parameters = ("activation_type", "use_shuffled_weight", "weight_layout")
    preparation = "prepare_trtllm_bf16_weights"
    choices = (BF16,)
    number = BF16.number
    clamped = True
    layout = BLOCK_MAJOR_K


class Fp8Block(Format):
    """Describes DeepSeek's e4m3 weights with an f32 scale for each 128×128 block."""

    op = "trtllm_fp8_block_scale_moe"
    parameters = (
        *("routing_bias", "activation_type", "hidden_states_scale"),
        *("use_shuffled_weight", "weight_layout", "fp8_quantization_type"),
    )
    preparation = "prepare_trtllm_fp8_block_weights"
    quant = "DeepSeekFp8"
    choices = (FP8_BLOCK,)
    number = E4M3
    grid = grids.E4M3_BLOCK
    experts_multiple_of = 4
    clamped = True
    fp8_quantization = 1
    epilogue_rows = 64
    """Rows of an epilogue tile. They are half as many as usual because the activation is a separate kernel."""

    def __init__(self, layout: Fp8BlockLayout = "blocked") -> None:
        super().__init__()
        self.shuffled = layout == "blocked"
        self.layout = BLOCK_MAJOR_K if self.shuffled else MAJOR_K

    def prepare(self, expert: Expert) -> dict[str, torch.Tensor]:
        """See `Format.prepare`. If shuffled, the weights are e4m3 `[1, K/128, N, 128]`, as in vLLM."""
        import flashinfer
        import torch
        from flashinfer.fused_moe import convert_to_block_layout

        prepared = super().prepare(expert)
        if self.shuffled:
            for name in WEIGHTS:
                rows = flashinfer.shuffle_matrix_a(prepared[name][0].view(torch.uint8), self.epilogue_rows)
                blocked = convert_to_block_layout(rows, 128)  # bytes of K in a block
                prepared[name] = blocked.view(torch.float8_e4m3fn).unsqueeze(0)
        return prepared

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns e4m3 `[M, H]` and f32 scales `[H/128, M]`."""
        import torch

        if not x.is_cuda:
            from flashinfer.fused_moe import prepare

            quantized, scales = prepare.prepare_trtllm_fp8_block_activations(x, quant=self._quant_config())
            return quantized, scales
        # one kernel, as in an engine; FlashInfer's preparation launches several torch kernels
        from moetune.backends.grouped_triton.quantize import GROUP, quantize_rows

        quantized = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        scales = torch.empty(len(x), x.shape[1] // GROUP, dtype=torch.float32, device=x.device)
        quantize_rows(x, quantized, scales)
        return quantized, scales.t().contiguous()


class Fp8Tensor(Format):
    """Describes e4m3 weights with one scale for each expert's matrix, and static scales of the activations."""

    op = "trtllm_fp8_per_tensor_scale_moe"
    parameters = ("routing_bias", "activation_type", "use_routing_scales_on_input")
    preparation = "prepare_trtllm_fp8_per_tensor_weights"
    choices = (FP8_TENSOR,)
    number = E4M3
    grid = grids.E4M3_BLOCK
    weight_on_input = True
    ids_in_logits_mode = True
    one_tuner_op = False
    block_scales = False
    scalars = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
    multipliers = MappingProxyType(
        {"hidden_states_scale_global": 1 / grids.E4M3_BLOCK.unit(1.0), "intermediate_scale_global": 32.0}
    )
    """The first maps inputs of variance 1 back to their grid. Intermediates are at most about 14; 14 · 32 = 448."""

    def prepare(self, expert: Expert) -> dict[str, torch.Tensor]:
        """See `Format.prepare`."""
        return {name: tensor for name, tensor in super().prepare(expert).items() if name not in self.multipliers}

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns e4m3 `[M, H]` and None."""
        import torch
        from flashinfer.fused_moe import prepare

        scale = x.new_tensor(self.multipliers["hidden_states_scale_global"], dtype=torch.float32)
        quantized, _ = prepare.prepare_trtllm_fp8_per_tensor_activations(x, hidden_states_scale_global=scale)
        return quantized, None


class Fp4(Format):
    """Holds what nvfp4 and mxfp4 weights have in common: one op, and e2m1 values, two in a byte."""

    op = "trtllm_fp4_block_scale_moe"
    parameters = (
        *("routing_bias", "activation_type", "hidden_states_scale", "hidden_states_scale_layout"),
        *(*CLAMP, "gemm1_bias", "gemm2_bias"),
    )
    preparation = "prepare_trtllm_fp4_weights"
    ids_in_logits_mode = True
    scalars = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns nvfp4 uint8 `[M, H/2]` and e4m3 `[M, H/16]`; mxfp8 e4m3 `[M, H]` and e8m0 bytes `[M, H/32]`."""
        if self.activations == BF16:
            return x, None
        from flashinfer.fused_moe import prepare

        quantized, scales = prepare.prepare_trtllm_fp4_activations(x, quant=self._quant_config())
        return quantized, scales


class Nvfp4(Fp4):
    """Describes e2m1 weights with an e4m3 scale for 16 values."""

    quant = "NVFP4"
    choices = (NVFP4,)
    number = NVFP4.number
    grid = grids.NVFP4

    def prepare(self, expert: Expert) -> dict[str, torch.Tensor]:
        """See `Format.prepare`."""
        # the block scales are e4m3, which has few small numbers, so the outputs' scalars take the unit
        unit1, unit2 = (self.grid.unit(weights.shape[1] ** -0.5) for weights in (expert.w1, expert.w2))
        prepared = super().prepare(Expert(expert.w1 / unit1, expert.w2 / unit2))
        del prepared["gemm1_alpha"]
        ones = prepared["output2_scale_scalar"]
        return prepared | dict(zip(self.scalars, (ones * unit1, ones * unit1, ones * unit2), strict=True))


class Mxfp4(Fp4):
    """Describes e2m1 weights with an e8m0 scale for 32 values, gpt-oss's format."""

    quant = "MXFP4"
    choices = (BF16, MXFP8)
    number = dtype_number(1, 0, 4, 12)
    grid = grids.MXFP4
    multiple_of = 256
    padded = True
    clamped = True
    bias = True
    epilogue_rows = 128
    """Rows of an epilogue tile."""

    def prepare(self, expert: Expert) -> dict[str, torch.Tensor]:
        """See `Format.prepare`. Biases are f32 `[1, 2·I]` and `[1, H]`, in the order of their weights' rows."""
        from flashinfer.fused_moe import core

        prepared = super().prepare(expert)
        if expert.b1 is None or expert.b2 is None:
            return prepared
        first = core._maybe_get_cached_w3_w1_permute_indices({}, expert.b1.unsqueeze(1), self.epilogue_rows)
        second = core.get_w2_permute_indices_with_cache({}, expert.b2.unsqueeze(1), self.epilogue_rows)
        return prepared | {
            "gemm1_bias": expert.b1[first.to(expert.b1.device)].unsqueeze(0),
            "gemm2_bias": expert.b2[second.to(expert.b2.device)].unsqueeze(0),
        }


class Mxint4(Format):
    """Describes int4 weights with a bf16 scale for 32 values."""

    op = "trtllm_mxint4_block_scale_moe"
    parameters = CLAMP
    preparation = "prepare_trtllm_mxint4_weights"
    choices = (BF16,)
    number = dtype_number(1, 1, 4, 14)
    grid = grids.MXINT4
    multiple_of = 256
    unpacked_ids = False
    layout = BLOCK_MAJOR_K


FORMATS: Mapping[Precision, Format] = {
    Precision.BF16: Bf16(),
    Precision.FP8_BLOCK: Fp8Block(),
    Precision.FP8_TENSOR: Fp8Tensor(),
    Precision.NVFP4: Nvfp4(),
    Precision.MXFP4: Mxfp4(),
    Precision.MXINT4: Mxint4(),
}
"""The format of each precision with its default options."""


def format_of(precision: Precision, mxfp4_activations: str, fp8_block_layout: str) -> Format:
    """Returns the format of a precision that `FORMATS` has, with these options if it has them."""
    if precision is Precision.MXFP4 and mxfp4_activations == "mxfp8":
        return Mxfp4(MXFP8)
    if precision is Precision.FP8_BLOCK and fp8_block_layout == "plain":
        return Fp8Block("plain")
    return FORMATS[precision]
