"""Draws one rank's random experts, lays them out as the kernels read them, and quantizes activations for them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from moetune.backends.flashinfer_trtllm.grids import draw
from moetune.backends.flashinfer_trtllm.weight_format import Expert, ExpertSizes, Format
from moetune.spec.layer import SWIGLU_ALPHA, SWIGLU_BETA, SWIGLU_LIMIT, Activation, MoELayer

BIAS_DEVIATION = 0.1
CLAMPED_SWIGLU = {"gemm1_alpha": SWIGLU_ALPHA, "gemm1_beta": SWIGLU_BETA, "gemm1_clamp_limit": SWIGLU_LIMIT}
"""The constants of `Activation.SWIGLU_CLAMPED` by the op's names."""


class Weights:
    """Draws one rank's random experts. `arguments` are the op's; `expert(i)` draws an expert again.

    Weights have a variance near 1/fan-in, so that values keep their size through both GEMMs.
    """

    def __init__(self, layer: MoELayer, fmt: Format, sizes: ExpertSizes, seed: int, device: str) -> None:
        self.layer, self.format, self.sizes = layer, fmt, sizes
        self._seed, self._device = seed, device
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
        return draw(self.format.activations.grid, rows, self.sizes.hidden, 1.0, generator)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pads and quantizes bf16 `[M, H]` for the kernel. Returns the activations and their block scales or None."""
        if padding := self.sizes.padded_hidden - self.sizes.hidden:
            x = pad(x, (0, padding))
        return self.format.quantize(x)

    def _weight(self, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
        return draw(self.format.grid, rows, columns, columns**-0.5, generator)

    def _prepare(self) -> dict[str, torch.Tensor]:
        """Lays out every expert by FlashInfer's preparation, one at a time so that no bf16 copy of all is needed."""
        arguments: dict[str, torch.Tensor] = {}
        for index in range(self.sizes.num_local):
            for name, tensor in self.format.prepare(self._padded(self.expert(index))).items():
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
        w1 = torch.cat([pad(half, (0, hidden, 0, intermediate)) for half in expert.w1.chunk(2)])
        w2 = pad(expert.w2, (0, intermediate, 0, hidden))
        if expert.b1 is None or expert.b2 is None:
            return Expert(w1, w2)
        b1 = torch.cat([pad(half, (0, intermediate)) for half in expert.b1.chunk(2)])
        return Expert(w1, w2, b1, pad(expert.b2, (0, hidden)))
