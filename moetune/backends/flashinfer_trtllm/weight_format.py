"""Defines `Format`: everything that a weight format of the trtllm-gen kernels decides. `formats` has each one.

Source: FlashInfer 0.7.2.post1: `fused_moe/core.py`, `fused_moe/prepare.py` and
`csrc/trtllm_fused_moe_kernel_launcher.cu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moetune.backends.flashinfer_trtllm.activations import Activations
from moetune.backends.flashinfer_trtllm.grids import Grid
from moetune.spec.layer import Activation, MoELayer

if TYPE_CHECKING:
    import torch

MAJOR_K, BLOCK_MAJOR_K = 0, 2
"""Numbers of FlashInfer's `WeightLayout`."""
WEIGHTS = ("gemm1_weights", "gemm2_weights")
CLAMP = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")


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
        meta = {name: torch.empty(1, 1, packed, dtype=torch.uint8, device="meta") for name in WEIGHTS}
        if grid and self.block_scales:
            for name in WEIGHTS:
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
