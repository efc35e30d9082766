"""Describes each weight format of the trtllm-gen kernels by one class.

Source: FlashInfer 0.7.2.post1: `fused_moe/core.py`, `fused_moe/prepare.py` and
`csrc/trtllm_fused_moe_kernel_launcher.cu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from moetune.backends.flashinfer_trtllm import grids
from moetune.backends.flashinfer_trtllm.activations import (
    BF16,
    E4M3,
    FP8_BLOCK,
    FP8_TENSOR,
    MXFP8,
    NVFP4,
    Activations,
    dtype_number,
)
from moetune.backends.flashinfer_trtllm.grids import Grid
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer

if TYPE_CHECKING:
    import torch

Fp8BlockLayout = Literal["blocked", "plain"]
"""The layout of DeepSeek's e4m3 experts: shuffled and blocked along K (vLLM), or as in the checkpoint (SGLang).

Each layout has kernels and tactics of its own, so a tactic of one is not a tactic of the other.
"""

MAJOR_K, BLOCK_MAJOR_K = 0, 2
"""Numbers of FlashInfer's `WeightLayout`."""
_WEIGHTS = ("gemm1_weights", "gemm2_weights")
_CLAMP = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """Holds one expert: bf16 `w1` `[2·I, H]`, up before gate; `w2` `[H, I]`; f32 biases `b1`, `b2` or None."""

    w1: torch.Tensor
    w2: torch.Tensor
    b1: torch.Tensor | None = None
    b2: torch.Tensor | None = None


class Format:
    """Describes a weight format completely. Each subclass describes one; this class says what most have in common.

    Args:
        activations: one of `choices`; by default the first.

    The op: `op` is the public function that routes from logits. `parameters`: those that some other ops lack.
    `unpacked_ids`: whether ids and weights can be separate tensors. `one_tuner_op`: whether `op` and `routed_op` have
    one name for FlashInfer's tuner. `ids_in_logits_mode`: whether the tuner sees buffers of ids if the kernel routes.

    The layers: `multiple_of`: H and I/tp must be multiples of it. `padded`: they are padded to multiples, as vLLM and
    SGLang do for gpt-oss. `experts_multiple_of`: E must be a multiple of it. `clamped`, `bias`: whether the op computes
    the clamped swiglu and adds biases. `weight_on_input`: whether it can apply the router's weight to the input.

    The weights: `preparation` is the function in FlashInfer's `prepare` that lays them out, `multipliers` the static
    scales that it needs. `quant`: their name in `QuantFormat`, if it needs one. `number`: that of `DtypeTrtllmGen`.
    `choices`: the activations that can multiply them. `grid`: the values that they hold without loss; None for all of
    bf16. `block_scales`: whether their blocks have scales. `scalars`: the op's parameters with one f32 value an expert.
    `fp8_quantization`: the number of `Fp8QuantizationType`. `shuffled`: whether their rows are shuffled. `layout`: the
    number of `WeightLayout`.
    """

    op: str
    parameters: tuple[str, ...]
    unpacked_ids: bool = True
    one_tuner_op: bool = True
    ids_in_logits_mode: bool = False

    multiple_of: int = 128
    padded: bool = False
    experts_multiple_of: int = 1
    clamped: bool = False
    bias: bool = False
    weight_on_input: bool = False

    preparation: str
    multipliers: Mapping[str, float] = MappingProxyType({})
    quant: str = ""
    number: int
    choices: tuple[Activations, ...]
    grid: Grid | None = None
    block_scales: bool = True
    scalars: tuple[str, ...] = ()
    fp8_quantization: int = 0
    shuffled: bool = True
    layout: int = MAJOR_K

    def __init__(self, activations: Activations | None = None) -> None:
        self.activations = activations or self.choices[0]

    @property
    def routed_op(self) -> str:
        """The public function for given ids."""
        return self.op.removesuffix("_moe") + "_routed_moe"

    def tuner_op(self, routed: bool) -> str:
        """Returns the op's name for FlashInfer's tuner, for given ids or for logits."""
        return f"flashinfer::{self.routed_op if routed and not self.one_tuner_op else self.op}"

    def aligned(self, size: int) -> int:
        """Returns `size`, padded to the next multiple of `multiple_of` if the format is padded."""
        return -(-size // self.multiple_of) * self.multiple_of if self.padded else size

    def unsupported(self, layer: MoELayer, intermediate: int) -> str | None:
        """Returns why the op does not compute a layer with this I/tp; None if it computes it."""
        name, multiple = layer.precision.value, self.multiple_of
        if not self.padded and (layer.hidden_size % multiple or intermediate % multiple):
            given = f"H = {layer.hidden_size} and I/tp = {intermediate}"
            return f"needs multiples of {multiple} for {name} experts; given {given}"
        clamped = self.clamped and layer.activation is Activation.SWIGLU_CLAMPED
        if layer.activation is not Activation.SILU and not clamped:
            return f"computes no {layer.activation.value} with {name} experts"
        if layer.expert_bias and not self.bias:
            return f"adds no bias to {name} experts"
        if layer.weight_on_input and not (self.weight_on_input and layer.top_k == 1):
            return (
                "applies the router's weight to the input of fp8_tensor experts at top_k = 1 only; "
                f"given {name} experts at top_k = {layer.top_k}"
            )
        if layer.num_experts % self.experts_multiple_of:
            return f"needs a multiple of {self.experts_multiple_of} experts, given {layer.num_experts}"
        return None

    def meta_weights(self, num_local: int) -> dict[str, torch.Tensor]:
        """Returns weights without storage. The ops' Python code reads only the number of fp4 values a scale."""
        import torch

        grid, width = self.grid, self.multiple_of
        packed = width // 2 if grid and grid.kind == "e2m1" else width
        meta = {name: torch.empty(1, 1, packed, dtype=torch.uint8, device="meta") for name in _WEIGHTS}
        if grid and self.block_scales:
            for name in _WEIGHTS:
                scales = torch.empty(1, 1, width // grid.block, dtype=torch.float8_e4m3fn, device="meta")
                meta[f"{name}_scale"] = scales
        return meta | {name: torch.empty(num_local, device="meta") for name in self.scalars}

    def prepare(self, expert: Expert) -> dict[str, torch.Tensor]:
        """Returns the op's arguments of one expert, each with a leading dimension of 1."""
        from flashinfer.fused_moe import prepare

        hidden, intermediate = expert.w2.shape
        sizes = {"num_local_experts": 1, "hidden_size": hidden, "intermediate_size": intermediate}
        quant = {"quant": self._quant_config()} if self.quant else {}
        function = getattr(prepare, self.preparation)
        return dict(function(expert.w1.unsqueeze(0), expert.w2.unsqueeze(0), **sizes, **self.multipliers, **quant))

    def _quant_config(self) -> Any:
        from flashinfer.fused_moe.api import QuantConfig, QuantFormat

        return QuantConfig(weight=QuantFormat[self.quant], activation=QuantFormat[self.activations.quant])

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Quantizes bf16 `[M, H]` to `activations`. Returns them and their block scales or None."""
        return x, None

    def arguments(self, layer: MoELayer, scale: torch.Tensor | None) -> dict[str, Any]:
        """Returns the arguments of `parameters`. Those that are None here can be overridden by weights or a routing.

        Args:
            layer: the whole layer.
            scale: the activations' block scales or None.
        """
        from flashinfer.tllm_enums import ActivationType, Fp8QuantizationType, SfLayout

        known = {
            "activation_type": ActivationType.Swiglu.value,
            "hidden_states_scale": scale,
            "hidden_states_scale_layout": SfLayout.layout_linear,
            "use_routing_scales_on_input": layer.weight_on_input,
            "use_shuffled_weight": self.shuffled,
            "weight_layout": self.layout,
            "fp8_quantization_type": Fp8QuantizationType(self.fp8_quantization),
        }
        return {name: known.get(name) for name in self.parameters}


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
            for name in _WEIGHTS:
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
        *(*_CLAMP, "gemm1_bias", "gemm2_bias"),
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
    parameters = _CLAMP
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


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Holds L, H and I/tp of one rank's experts, and H and I/tp as they are padded for the kernel."""

    num_local: int
    hidden: int
    intermediate: int
    padded_hidden: int
    padded_intermediate: int

    @classmethod
    def of(cls, fmt: Format, num_local: int, hidden: int, intermediate: int) -> ExpertSizes:
        """Returns the sizes of one rank's experts in a format."""
        return cls(num_local, hidden, intermediate, fmt.aligned(hidden), fmt.aligned(intermediate))
