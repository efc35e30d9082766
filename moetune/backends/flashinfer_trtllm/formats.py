"""Describes the six weight formats: their op, their activations, and the values that they hold without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moetune.backends.prepared import E4M3_MAX
from moetune.spec.enums import Precision

Activations = Literal["bf16", "fp8_block", "fp8_tensor", "nvfp4", "mxfp8"]
"""The activations that weights are multiplied with.

`fp8_block`: e4m3, one f32 scale for 128 values. `fp8_tensor`: e4m3, one f32 scale for all. `nvfp4`: e2m1, one e4m3
scale for 16 values. `mxfp8`: e4m3, one e8m0 scale for 32 values.
"""

Fp8BlockLayout = Literal["blocked", "plain"]
"""The layout of DeepSeek's e4m3 experts: shuffled and blocked along K (vLLM), or as in the checkpoint (SGLang).

Each layout has kernels and tactics of its own, so a tactic of one is not a tactic of the other.
"""


@dataclass(frozen=True, slots=True)
class Grid:
    """Describes random values that a quantized format holds without loss.

    They are numbers of `kind`. Each block of `block` values has one of magnitude `largest`, so every quantizer finds
    the same scale, a power of two, and rounds nothing. `deviation` is that of the normal values that are rounded to the
    grid.
    """

    kind: Literal["e2m1", "e4m3", "int4"]
    block: int
    largest: float
    deviation: float


E4M3_BLOCK = Grid("e4m3", 128, E4M3_MAX, 112.0)
E4M3_MX = Grid("e4m3", 32, E4M3_MAX, 112.0)
NVFP4 = Grid("e2m1", 16, 6.0, 2.0)
MXFP4 = Grid("e2m1", 32, 6.0, 2.0)
MXINT4 = Grid("int4", 32, -8.0, 2.5)

ACTIVATION_GRIDS: Mapping[Activations, Grid | None] = {
    "bf16": None,
    "fp8_block": E4M3_BLOCK,
    "fp8_tensor": E4M3_BLOCK,
    "nvfp4": NVFP4,
    "mxfp8": E4M3_MX,
}

INTERMEDIATE_TOLERANCES: Mapping[Activations, float] = {
    "bf16": 2e-2,
    "fp8_block": 8e-2,
    "fp8_tensor": 8e-2,
    "nvfp4": 0.2,
    "mxfp8": 8e-2,
}
"""Weights and inputs are on their grids, so only rounding the intermediate causes errors: 2⁻⁹, 2⁻⁴ or 2⁻² at most."""


@dataclass(frozen=True, slots=True)
class Format:
    """Describes how FlashInfer computes one weight format.

    `op`: the public function that routes from logits. `activations`: the allowed ones, the default first.
    `multiple_of`: H and I/tp must be multiples of it. `padded`: they are padded to multiples, as vLLM and SGLang do for
    gpt-oss. `clamped`, `bias`: whether the op computes the clamped swiglu and adds biases. `weight_on_input`: whether
    it can apply the router's weight to an expert's input. `unpacked_ids`: whether ids and weights can be separate
    tensors.
    """

    op: str
    activations: tuple[Activations, ...]
    grid: Grid | None
    multiple_of: int = 128
    padded: bool = False
    clamped: bool = False
    bias: bool = False
    weight_on_input: bool = False
    unpacked_ids: bool = True

    @property
    def routed_op(self) -> str:
        """The public function for given ids."""
        return self.op.removesuffix("_moe") + "_routed_moe"

    def aligned(self, size: int) -> int:
        """Returns `size`, padded to the next multiple of `multiple_of` if the format is padded."""
        return -(-size // self.multiple_of) * self.multiple_of if self.padded else size


FORMATS: Mapping[Precision, Format] = {
    Precision.BF16: Format("trtllm_bf16_moe", ("bf16",), None, clamped=True),
    Precision.FP8_BLOCK: Format("trtllm_fp8_block_scale_moe", ("fp8_block",), E4M3_BLOCK, clamped=True),
    Precision.FP8_TENSOR: Format("trtllm_fp8_per_tensor_scale_moe", ("fp8_tensor",), E4M3_BLOCK, weight_on_input=True),
    Precision.NVFP4: Format("trtllm_fp4_block_scale_moe", ("nvfp4",), NVFP4),
    Precision.MXFP4: Format(
        "trtllm_fp4_block_scale_moe",
        ("bf16", "mxfp8"),
        MXFP4,
        multiple_of=256,
        padded=True,
        clamped=True,
        bias=True,
    ),
    Precision.MXINT4: Format("trtllm_mxint4_block_scale_moe", ("bf16",), MXINT4, multiple_of=256, unpacked_ids=False),
}
"""FlashInfer 0.7.2.post1: fused_moe/core.py, fused_moe/prepare.py, csrc/trtllm_fused_moe_kernel_launcher.cu."""


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
