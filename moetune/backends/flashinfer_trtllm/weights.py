"""Draws random experts on a format's grid, lays them out as the kernels read them, and quantizes activations.

A format holds the drawn values without loss. So the reference multiplies exactly the numbers that the kernel does, and
a quantizer's rounding cannot hide a wrong layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetune.backends.flashinfer_trtllm.formats import (
    ACTIVATION_GRIDS,
    FORMATS,
    Activations,
    ExpertSizes,
    Fp8BlockLayout,
    Grid,
)
from moetune.spec.enums import Precision
from moetune.spec.layer import SWIGLU_ALPHA, SWIGLU_BETA, SWIGLU_LIMIT, Activation, MoELayer

EPILOGUE_ROWS = 128
"""Rows of an epilogue tile."""
DEEPSEEK_EPILOGUE_ROWS = 64
"""Rows of an epilogue tile if the activation is a separate kernel."""
BLOCK_BYTES = 128
"""Bytes of K in a block of the layout `BlockMajorK`."""

BIAS_DEVIATION = 0.1
INTERMEDIATE_MULTIPLIER = 32.0
"""The static e4m3 scale of the intermediate, whose values are about 0.5 and at most 14; 14 · 32 = 448."""
CLAMPED_SWIGLU = {"gemm1_alpha": SWIGLU_ALPHA, "gemm1_beta": SWIGLU_BETA, "gemm1_clamp_limit": SWIGLU_LIMIT}
"""The constants of `Activation.SWIGLU_CLAMPED` by the op's names."""

_E2M1_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def on_grid(grid: Grid, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Draws random values of the grid, float32 `[rows, columns]`. Each block's first has the largest magnitude."""
    device = generator.device
    values = torch.randn(rows, columns, generator=generator, device=device).mul_(grid.deviation)
    match grid.kind:
        case "e2m1":
            steps = torch.tensor(_E2M1_STEPS, device=device)
            values = steps[torch.bucketize(values.abs(), (steps[1:] + steps[:-1]) / 2)] * values.sign()
        case "e4m3":
            values = values.clamp_(-grid.largest, grid.largest).to(torch.float8_e4m3fn).float()
        case "int4":
            values = values.round_().clamp_(-8, 7)
    first = values[:, :: grid.block]
    # int4 has no 8, only −8. Elsewhere signs are random; otherwise the blocks' first columns would add up in a GEMM.
    values[:, :: grid.block] = (
        grid.largest if grid.largest < 0 else torch.copysign(first.new_tensor(grid.largest), first)
    )
    return values


def exponent(grid: Grid, deviation: float) -> int:
    """Returns the exponent of the power of two that scales `on_grid`'s values to about `deviation`."""
    return round(math.log2(deviation / math.hypot(grid.deviation, grid.largest / math.sqrt(grid.block))))


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """Holds one expert: bf16 `w1` `[2·I, H]`, up before gate; `w2` `[H, I]`; f32 biases `b1`, `b2` or None."""

    w1: torch.Tensor
    w2: torch.Tensor
    b1: torch.Tensor | None = None
    b2: torch.Tensor | None = None


class Weights:
    """Draws one rank's random experts. `arguments` are the op's; `expert(i)` draws an expert again.

    Weights have a variance near 1/fan-in, so that values keep their size through both GEMMs.
    """

    def __init__(
        self,
        layer: MoELayer,
        activations: Activations,
        sizes: ExpertSizes,
        seed: int,
        device: str,
        fp8_block_layout: Fp8BlockLayout = "blocked",
    ) -> None:
        self.layer, self.activations, self.sizes = layer, activations, sizes
        self.fp8_block_layout = fp8_block_layout
        self._seed, self._device = seed, device
        self._grid = FORMATS[layer.precision].grid
        self.arguments = self._prepare()

    def expert(self, index: int) -> Expert:
        """Returns expert `index` of this rank, the same at every call."""
        sizes = self.sizes
        generator = torch.Generator(self._device).manual_seed(self._seed * 65537 + index)
        w1 = self._weight(2 * sizes.intermediate, sizes.hidden, generator)
        w2 = self._weight(sizes.hidden, sizes.intermediate, generator)
        if not self.layer.expert_bias:
            return Expert(w1, w2)
        b1, b2 = (
            torch.randn(rows, generator=generator, device=self._device).mul_(BIAS_DEVIATION)
            for rows in (2 * sizes.intermediate, sizes.hidden)
        )
        return Expert(w1, w2, b1, b2)

    def input_rows(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Draws bf16 activations `[rows, H]` of variance about 1, which the activations' quantizer does not change."""
        grid = ACTIVATION_GRIDS[self.activations]
        if grid is None:
            values = torch.randn(rows, self.sizes.hidden, generator=generator, device=generator.device)
        else:
            values = on_grid(grid, rows, self.sizes.hidden, generator).mul_(2.0 ** exponent(grid, 1.0))
        return values.bfloat16()

    def _weight(self, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
        if self._grid is None:
            values = torch.randn(rows, columns, generator=generator, device=generator.device).mul_(columns**-0.5)
        else:
            values = on_grid(self._grid, rows, columns, generator).mul_(self._unit(columns))
        return values.bfloat16()

    def _unit(self, fan_in: int) -> float:
        assert self._grid is not None
        return 2.0 ** exponent(self._grid, fan_in**-0.5)

    def _prepare(self) -> dict[str, torch.Tensor]:
        """Lays out every expert by FlashInfer's preparation, one at a time so that no bf16 copy of all is needed."""
        arguments: dict[str, torch.Tensor] = {}
        for index in range(self.sizes.num_local):
            for name, tensor in self._prepared(self._padded(self.expert(index))).items():
                if index == 0:
                    arguments[name] = tensor.new_empty((self.sizes.num_local, *tensor.shape[1:]))
                arguments[name][index] = tensor[0]
        if self.layer.activation is Activation.SWIGLU_CLAMPED:
            for name, value in CLAMPED_SWIGLU.items():
                arguments[name] = torch.full((self.sizes.num_local,), value, device=self._device)
        return arguments

    def _padded(self, expert: Expert) -> Expert:
        sizes = self.sizes
        if (sizes.hidden, sizes.intermediate) == (sizes.padded_hidden, sizes.padded_intermediate):
            return expert
        hidden, intermediate = sizes.padded_hidden - sizes.hidden, sizes.padded_intermediate - sizes.intermediate
        pad = torch.nn.functional.pad
        w1 = torch.cat([pad(half, (0, hidden, 0, intermediate)) for half in expert.w1.chunk(2)])
        w2 = pad(expert.w2, (0, intermediate, 0, hidden))
        if expert.b1 is None or expert.b2 is None:
            return Expert(w1, w2)
        b1 = torch.cat([pad(half, (0, intermediate)) for half in expert.b1.chunk(2)])
        return Expert(w1, w2, b1, pad(expert.b2, (0, hidden)))

    def _prepared(self, expert: Expert) -> Mapping[str, torch.Tensor]:
        """Returns the op's arguments of one expert, each with a leading dimension of 1."""
        from flashinfer.fused_moe import prepare

        view: dict[str, torch.Tensor]
        w1, w2 = expert.w1.unsqueeze(0), expert.w2.unsqueeze(0)
        shape: dict[str, Any] = {
            "num_local_experts": 1,
            "hidden_size": self.sizes.padded_hidden,
            "intermediate_size": self.sizes.padded_intermediate,
        }
        match self.layer.precision:
            case Precision.BF16:
                return prepare.prepare_trtllm_bf16_weights(w1, w2, **shape)  # type: ignore[no-any-return]
            case Precision.MXINT4:
                return prepare.prepare_trtllm_mxint4_weights(w1, w2, **shape)  # type: ignore[no-any-return]
            case Precision.FP8_BLOCK:
                view = prepare.prepare_trtllm_fp8_block_weights(w1, w2, quant=self._quant(), **shape)
                if self.fp8_block_layout == "plain":
                    return view
                return view | {name: _deepseek_layout(view[name]) for name in ("gemm1_weights", "gemm2_weights")}
            case Precision.FP8_TENSOR:
                view = prepare.prepare_trtllm_fp8_per_tensor_weights(
                    w1,
                    w2,
                    hidden_states_scale_global=input_multiplier(),
                    intermediate_scale_global=INTERMEDIATE_MULTIPLIER,
                    **shape,
                )
                return {name: tensor for name, tensor in view.items() if not name.endswith("_global")}
            case Precision.NVFP4:
                # the block scales are e4m3, which has few small numbers, so the outputs' scalars take the unit
                units = self._unit(self.sizes.hidden), self._unit(self.sizes.intermediate)
                view = prepare.prepare_trtllm_fp4_weights(w1 / units[0], w2 / units[1], quant=self._quant(), **shape)
                del view["gemm1_alpha"]
                ones = view["output2_scale_scalar"]
                return view | {
                    "output1_scale_scalar": ones * units[0],
                    "output1_scale_gate_scalar": ones * units[0],
                    "output2_scale_scalar": ones * units[1],
                }
            case _:
                view = prepare.prepare_trtllm_fp4_weights(w1, w2, quant=self._quant(), **shape)
                if expert.b1 is not None and expert.b2 is not None:
                    view |= _bias_layout(expert.b1, expert.b2)
                return view

    def _quant(self) -> Any:
        return quant_config(self.layer.precision, self.activations)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pads and quantizes bf16 `[M, H]` for the kernel. Returns the activations and their scales or None.

        They are: bf16 unchanged, None; fp8_block e4m3 `[M, H]`, f32 `[H/128, M]`; fp8_tensor e4m3 `[M, H]`, None; nvfp4
        uint8 `[M, H/2]`, e4m3 `[M, H/16]`; mxfp8 e4m3 `[M, H]`, e8m0 bytes typed as e4m3 `[M, H/32]`.
        """
        from flashinfer.fused_moe import prepare

        if self.sizes.padded_hidden > self.sizes.hidden:
            x = torch.nn.functional.pad(x, (0, self.sizes.padded_hidden - self.sizes.hidden))
        match self.activations:
            case "bf16":
                return x, None
            case "fp8_block":
                return _quantize_fp8_block(x)
            case "fp8_tensor":
                quantized, _ = prepare.prepare_trtllm_fp8_per_tensor_activations(
                    x, hidden_states_scale_global=x.new_tensor(input_multiplier(), dtype=torch.float32)
                )
                return quantized, None
            case _:
                return prepare.prepare_trtllm_fp4_activations(x, quant=self._quant())  # type: ignore[no-any-return]


def input_multiplier() -> float:
    """Returns the static e4m3 scale of fp8_tensor's inputs, which maps `input_rows` back to its grid."""
    grid = ACTIVATION_GRIDS["fp8_tensor"]
    assert grid is not None
    return 2.0 ** -exponent(grid, 1.0)


def quant_config(precision: Precision, activations: Activations) -> Any:
    """Returns FlashInfer's name for a pair of formats, for the precisions whose preparation needs one."""
    from flashinfer.fused_moe.api import QuantConfig, QuantFormat

    weight, activation = {
        (Precision.FP8_BLOCK, "fp8_block"): (QuantFormat.DeepSeekFp8, QuantFormat.DeepSeekFp8),
        (Precision.NVFP4, "nvfp4"): (QuantFormat.NVFP4, QuantFormat.NVFP4),
        (Precision.MXFP4, "bf16"): (QuantFormat.MXFP4, QuantFormat.BF16),
        (Precision.MXFP4, "mxfp8"): (QuantFormat.MXFP4, QuantFormat.MXFP8),
    }[precision, activations]
    return QuantConfig(weight=weight, activation=activation)


def _deepseek_layout(weights: torch.Tensor) -> torch.Tensor:
    """Shuffles e4m3 `[1, N, K]` and blocks it along K, `[1, K/128, N, 128]`, as vLLM does for DeepSeek's experts."""
    import flashinfer
    from flashinfer.fused_moe import convert_to_block_layout

    shuffled = flashinfer.shuffle_matrix_a(weights[0].view(torch.uint8), DEEPSEEK_EPILOGUE_ROWS)
    blocked: torch.Tensor = convert_to_block_layout(shuffled, BLOCK_BYTES)
    return blocked.view(torch.float8_e4m3fn).unsqueeze(0)


def _bias_layout(b1: torch.Tensor, b2: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the biases in the order of their weights' rows, f32 `[1, 2·I]` and `[1, H]`."""
    from flashinfer.fused_moe.core import (
        _maybe_get_cached_w3_w1_permute_indices,
        get_w2_permute_indices_with_cache,
    )

    first = _maybe_get_cached_w3_w1_permute_indices({}, b1.unsqueeze(1), EPILOGUE_ROWS)
    second = get_w2_permute_indices_with_cache({}, b2.unsqueeze(1), EPILOGUE_ROWS)
    return {"gemm1_bias": b1[first.to(b1.device)].unsqueeze(0), "gemm2_bias": b2[second.to(b2.device)].unsqueeze(0)}


def _quantize_fp8_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not x.is_cuda:
        from flashinfer.fused_moe import prepare

        return prepare.prepare_trtllm_fp8_block_activations(  # type: ignore[no-any-return]
            x, quant=quant_config(Precision.FP8_BLOCK, "fp8_block")
        )
    # one kernel, as in an engine; FlashInfer's preparation launches several torch kernels
    from moetune.backends.grouped_triton.quantize import GROUP, quantize_rows

    quantized = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(x), x.shape[1] // GROUP, dtype=torch.float32, device=x.device)
    quantize_rows(x, quantized, scales)
    return quantized, scales.t().contiguous()
