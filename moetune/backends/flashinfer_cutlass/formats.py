"""Describes by one class each how `cutlass_fused_moe` takes the experts of a precision on Hopper.

Source: FlashInfer 0.7.2.post1: `fused_moe/core.py`, `fused_moe/prepare.py`, and
`data/csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu`. Torch is imported in methods only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from moetune.backends.prepared import E4M3_MAX
from moetune.spec.enums import Precision

if TYPE_CHECKING:
    import torch

Mxfp4Activations = Literal["bf16", "fp8"]
"""What mxfp4 weights are multiplied with: bf16 (vLLM; SGLang's default), or e4m3 with a scale a row that the kernel
finds itself (SGLang's `--flashinfer-mxfp4-moe-precision fp8`)."""
Caller = Literal["vllm", "sglang"]
"""The engine whose call of the op is computed.

vLLM 0.33 lets the second GEMM's kernel add up a row's slots where it can, as is the default; SGLang 0.5.23 does not
(`SGLANG_FLASHINFER_MOE_FUSED_FINALIZE`). For mxfp4 both pad I/tp to a multiple of 128, and H to one of 128 (vLLM:
`mxfp4_round_up_hidden_size_and_intermediate_size`) or of 256 (SGLang: `FusedMoE.__init__`).
"""

FINALIZE = "use_fused_finalize"
MIDDLE_MAX = 32.0
"""The largest intermediate value in fp8. silu(gate) · up of normal values rarely exceeds it, and is saturated if so."""
_HUMMING_FACTOR = 64.0
"""What an expert's scale is multiplied with, for the exponents' biases that the kernel leaves out
(`cutlass_fused_moe`: `use_wfp4afp8_humming`)."""
_EIGHT_BITS = 5e-2
"""Rounding to e4m3 causes a relative error of 2⁻⁴/√7 = 2.4 %: half a step of 3 bits, spread evenly over [1, 2). The
inputs are rounded in the reference too, the intermediate is not."""


class Format:
    """Describes one format of experts. Each subclass describes one; this class says what most have in common.

    Args:
        caller: the engine whose call of the op is computed.

    `inputs`, `weights`: torch's names of the dtypes that the op gets. `packed`: the values in one element of the
    weights. `multiple`: H and I/tp must be multiples of it. `hidden_multiple`, `inner_multiple`: H and I/tp are padded
    to multiples of these. `flags`: the op's parameters that select the kernels; its runner and
    `cutlass_fused_moe_workspace_size` have the same ones. `fused_finalize`: whether the second GEMM's kernel may add up
    a row's slots. `tolerance`: the largest relative error of a right result.
    """

    inputs: str = "bfloat16"
    weights: str = "bfloat16"
    packed: int = 1
    multiple: int = 8
    hidden_multiple: int = 1
    inner_multiple: int = 1
    flags: Mapping[str, bool] = MappingProxyType({})
    tolerance: float = 1e-2

    def __init__(self, caller: str = "vllm") -> None:
        self.fused_finalize = caller == "vllm"

    @property
    def parameters(self) -> dict[str, bool]:
        """The op's parameters that decide which tactics there are, with their values."""
        return {**self.flags, FINALIZE: self.fused_finalize}

    @property
    def mixed(self) -> bool:
        """Whether its kernels are those for mixed input, with tactics for some sizes only and no fused finalize."""
        return self.packed > 1

    def padded(self, hidden: int, intermediate: int) -> tuple[int, int]:
        """Returns H and I/tp as the op gets them."""
        return _up(hidden, self.hidden_multiple), _up(intermediate, self.inner_multiple)

    def store(self, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Quantizes one expert's matrix, f32 `[N, K]`. Returns its values, then its scales if it has any."""
        raise NotImplementedError

    def load(self, *stored: torch.Tensor) -> torch.Tensor:
        """Returns the numbers that a stored matrix stands for: f32 `[N, K]`."""
        raise NotImplementedError

    def lay_out(self, *stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns stored matrices `[1, …]` as the kernels read them, the values first."""
        return stored

    def quant_scales(
        self, first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], input_scale: torch.Tensor
    ) -> list[torch.Tensor]:
        """Returns the op's `quant_scales`.

        Args:
            first: the laid-out matrices of GEMM1, values and scales, `[L, …]`.
            second: those of GEMM2.
            input_scale: what the inputs were divided by before they were given to the op, f32 `[]`.
        """
        return []

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the rows that the op gets, `[M, H]`, as the kernel multiplies them: f32."""
        return x.float()


class Bf16(Format):
    """Describes bf16 weights."""

    def store(self, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Format.store`."""
        return (weights.bfloat16(),)

    def load(self, *stored: torch.Tensor) -> torch.Tensor:
        """See `Format.load`."""
        return stored[0].float()


class Fp8Tensor(Format):
    """Describes e4m3 weights with one scale for each expert's matrix, and e4m3 inputs with one scale."""

    inputs = weights = "float8_e4m3fn"
    multiple = 16
    tolerance = _EIGHT_BITS

    def store(self, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Format.store`. The scale is f32 `[]`."""
        scale = weights.abs().max() / E4M3_MAX
        return _e4m3(weights / scale), scale

    def load(self, *stored: torch.Tensor) -> torch.Tensor:
        """See `Format.load`."""
        values, scale = stored
        return values.float() * scale

    def quant_scales(
        self, first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], input_scale: torch.Tensor
    ) -> list[torch.Tensor]:
        """Returns the f32 scales of GEMM1's dequantization `[L]`, of the intermediate's quantization `[]`, of GEMM2's
        dequantization `[L]` and of the inputs' dequantization `[]`."""
        middle = input_scale.new_tensor(MIDDLE_MAX / E4M3_MAX)
        return [first[1] * input_scale, 1 / middle, second[1] * middle, input_scale]


class Mxfp4(Format):
    """Describes mxfp4 weights, multiplied with bf16. Their scales are folded by 64 rows and 128 columns."""

    weights = "uint8"
    packed = 2
    multiple = 32
    inner_multiple = 128
    flags = MappingProxyType({"use_w4_group_scaling": True})

    def __init__(self, caller: str = "vllm") -> None:
        super().__init__(caller)
        self.hidden_multiple = 256 if caller == "sglang" else 128

    def store(self, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Format.store`. The scales are e8m0 bytes `[N, K/32]`."""
        from moetune.backends.flashinfer_cutlass.four_bits import to_mxfp4

        return to_mxfp4(weights)

    def load(self, *stored: torch.Tensor) -> torch.Tensor:
        """See `Format.load`."""
        from moetune.backends.flashinfer_cutlass.four_bits import from_mxfp4

        return from_mxfp4(*stored)

    def lay_out(self, *stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Format.lay_out`."""
        values, scales = stored
        fused_moe = _flashinfer()
        return (
            fused_moe.interleave_moe_weights_for_sm90_mixed_gemm(values, "fp4"),
            fused_moe.interleave_moe_scales_for_sm90_mixed_gemm(scales),
        )

    def quant_scales(
        self, first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], input_scale: torch.Tensor
    ) -> list[torch.Tensor]:
        """Returns the folded scales of both GEMMs."""
        return [first[1], second[1]]


class Mxfp4Fp8(Mxfp4):
    """Describes mxfp4 weights, multiplied with e4m3: what FlashInfer calls Humming. The op gets bf16."""

    flags = MappingProxyType({"use_w4_group_scaling": True, "use_wfp4afp8_humming": True})
    tolerance = _EIGHT_BITS

    def lay_out(self, *stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Format.lay_out`. The second scales are f32 `[1]`, one an expert."""
        values, folded, residual = _flashinfer().preprocess_moe_weights_for_sm90_mixed_gemm_humming(*stored)
        return values, folded, residual * _HUMMING_FACTOR

    def quant_scales(
        self, first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], input_scale: torch.Tensor
    ) -> list[torch.Tensor]:
        """Returns the folded scales and the experts' scales of both GEMMs. The third is reserved."""
        import torch

        words = [matrices[1].view(torch.int32) for matrices in (first, second)]
        return [words[0], first[2], input_scale.new_ones(()), words[1], second[2]]

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """See `Format.multiplied`. Each row is scaled so that its largest value is e4m3's limit."""
        most = x.float().abs().amax(-1, keepdim=True)
        factors = E4M3_MAX / most.where(most > 0, most.new_tensor(E4M3_MAX))
        return _e4m3(x.float() * factors).float() / factors


class Int4Fp8(Format):
    """Describes int4 weights in groups of 128, multiplied with e4m3. The op gets bf16 and rounds it without a scale."""

    weights = "uint8"
    packed = 2
    multiple = 128
    flags = MappingProxyType({"use_w4_group_scaling": True, "use_packed_weights": True})
    tolerance = _EIGHT_BITS

    def store(self, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Format.store`. The scales are bf16 `[N, K/128]`."""
        from moetune.backends.flashinfer_cutlass.four_bits import to_int4

        return to_int4(weights)

    def load(self, *stored: torch.Tensor) -> torch.Tensor:
        """See `Format.load`."""
        from moetune.backends.flashinfer_cutlass.four_bits import from_int4

        return from_int4(*stored)

    def lay_out(self, *stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Format.lay_out`."""
        from moetune.backends.flashinfer_cutlass.four_bits import INT4_GROUP

        values, scales = stored
        fused_moe = _flashinfer()
        return (
            fused_moe.interleave_moe_weights_for_sm90_mixed_gemm(values, "int4"),
            fused_moe.interleave_moe_scales_for_sm90_mixed_gemm(scales, INT4_GROUP),
        )

    def quant_scales(
        self, first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], input_scale: torch.Tensor
    ) -> list[torch.Tensor]:
        """Returns the folded scales of both GEMMs; bf16 factors of their inputs `[H]` and `[I]`, all 1; no zero points;
        and f32 factors of each expert's outputs `[L]`, all 1."""
        columns = [first[1].new_ones(matrices[0].shape[-1] * self.packed) for matrices in (first, second)]
        experts = input_scale.new_ones(len(first[0]))
        absent = first[1].new_empty(0)
        return [first[1], second[1], *columns, absent, absent, experts, experts]

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """See `Format.multiplied`."""
        return _e4m3(x).float()


FORMATS: Mapping[Precision, type[Format]] = {
    Precision.BF16: Bf16,
    Precision.FP8_TENSOR: Fp8Tensor,
    Precision.MXFP4: Mxfp4,
    Precision.W4A8: Int4Fp8,
}
"""The format of each precision with its default options."""
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "mxfp4_activations": get_args(Mxfp4Activations),
    "caller": get_args(Caller),
}
"""The values of each option, the default first."""


def format_of(precision: Precision, mxfp4_activations: str = "bf16", caller: str = "vllm") -> Format | None:
    """Returns the format of a precision with these options; None if the op does not tune it."""
    fp8 = precision is Precision.MXFP4 and mxfp4_activations == "fp8"
    kind = Mxfp4Fp8 if fp8 else FORMATS.get(precision)
    return None if kind is None else kind(caller)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _e4m3(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.to(torch.float8_e4m3fn)


def _flashinfer() -> Any:
    import importlib

    return importlib.import_module("flashinfer.fused_moe")
