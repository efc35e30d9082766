"""A module in the place of FlashInfer's compiled one: it writes down its arguments and enumerates recorded tactics.

FlashInfer's Python between the public ops and the compiled module is the installed one. The three functions of other
compiled modules, which quantize and interleave scales, are computed by their definitions.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flashinfer
import torch

SOURCE = Path(flashinfer.__file__).parent / "data/csrc/trtllm_fused_moe_kernel_launcher.cu"
TILES = (8, 16, 32, 64, 128)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@functools.cache
def native_parameters(function: str) -> list[str]:
    """The parameters of a function of the compiled module, read from its C++ source."""
    text = SOURCE.read_text()
    start = re.search(rf"^Array<\w+(?:<\w+>)?> {function}\(", text, re.MULTILINE)
    assert start is not None, function
    body = re.sub(r"<[^<>]*>", "", text[start.end() : text.index(") {", start.end())])
    return [parameter.split()[-1].lstrip("&*") for parameter in body.split(",")]


@dataclass
class CompiledModule:
    """What `build_and_load` would give. `calls` are the native functions' calls, arguments by their C++ names."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    queries: list[dict[str, Any]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def native(*arguments: Any) -> list[Any]:
            self.calls.append((name, dict(zip(native_parameters(name), arguments, strict=True))))
            return []

        return native

    def trtllm_get_valid_moe_configs(self, *arguments: Any) -> list[list[int]]:
        """`computeSelectedTileN` with two configurations a tile."""
        query = dict(zip(native_parameters("trtllm_get_valid_moe_configs"), arguments, strict=True))
        self.queries.append(query)
        mean = query["num_tokens"] * query["top_k"] / query["num_local_experts"]
        centre = next((i for i, tile in enumerate(TILES) if tile >= mean), len(TILES) - 1)
        return [[tile, config] for tile in TILES[max(0, centre - 1) : centre + 3] for config in (3, 7)]


def quantize_fp4(
    x: torch.Tensor, *, global_scale: torch.Tensor, sf_vec_size: int, sf_use_ue8m0: bool, is_sf_swizzled_layout: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """e2m1, two values a byte, the first one low; scales linear, e4m3 or e8m0 bytes."""
    assert not is_sf_swizzled_layout
    assert float(global_scale) == 1.0
    blocks = x.float().unflatten(-1, (-1, sf_vec_size))
    scale = blocks.abs().amax(-1) / 6
    if sf_use_ue8m0:
        exponents = torch.where(scale > 0, scale.log2().ceil(), -127.0)
        scale, stored = exponents.exp2(), (exponents + 127).to(torch.uint8)
    else:
        stored = scale.to(torch.float8_e4m3fn).view(torch.uint8)
        scale = stored.view(torch.float8_e4m3fn).float()
    units = blocks / scale.clamp(min=2.0**-127).unsqueeze(-1)
    codes = torch.bucketize(units.abs(), (E2M1[1:] + E2M1[:-1]) / 2).to(torch.uint8)
    codes = (codes | (units < 0).to(torch.uint8) << 3).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, stored.flatten()


def quantize_mxfp8(x: torch.Tensor, is_sf_swizzled_layout: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one e8m0 byte for 32 values."""
    assert not is_sf_swizzled_layout
    blocks = x.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1)
    exponents = torch.where(amax > 0, (amax / 448).log2().ceil(), -127.0)
    quantized = (blocks / exponents.exp2().unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    return quantized, (exponents + 127).to(torch.uint8).flatten()


def interleave(scales: torch.Tensor) -> torch.Tensor:
    """128×4 tiles, within one row r and column c at (r mod 32)·16 + (r div 32)·4 + c; flat."""
    rows, columns = scales.shape
    padded = torch.zeros(math.ceil(rows / 128) * 128, math.ceil(columns / 4) * 4, dtype=scales.dtype)
    padded[:rows, :columns] = scales
    tiles = padded.view(len(padded) // 128, 4, 32, -1, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().flatten()


def deinterleave(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """What `interleave` was given, if no padding was needed."""
    return flat.view(rows // 128, columns // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, columns)
