"""Packs 4-bit weights, scales and biases as Marlin reads them, and unpacks weights and scales.

Sources: `marlin_weights`, `get_weight_perm` and `marlin_permute_scales` of vLLM 0.26.0
(`quantization/utils/marlin_utils_test.py`, `marlin_utils.py`). `gptq_marlin_repack` of vLLM's library `_C` does the
same to weights as `pack_codes`; the library `_moe_C`, which has the kernel, does not contain it.
"""

from __future__ import annotations

from functools import cache

import torch

TILE = 16
"""Weights are reordered within tiles of 16×16."""
_CODES = 1024
"""The codes of four neighboring tiles, which are permuted together."""
_PACK = 8
"""The codes in one int32."""


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Returns one expert's codes as Marlin reads them: int32 `[K/16, 2·N]`.

    Args:
        codes: uint8 `[K, N]` below 16; K is a multiple of 16, N of 64.
    """
    K, N = codes.shape
    tiles = codes.reshape(K // TILE, TILE, N // TILE, TILE).transpose(1, 2)
    permuted = tiles.reshape(-1, _CODES)[:, _order(str(codes.device))]
    low, high = permuted.reshape(-1, 2).unbind(1)
    return (low | high << 4).view(torch.int32).reshape(K // TILE, N * TILE // _PACK)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Returns the codes of `pack_codes`: uint8 `[K, N]`."""
    K, N = packed.shape[0] * TILE, packed.shape[1] * _PACK // TILE
    pairs = packed.contiguous().view(torch.uint8)
    permuted = torch.stack((pairs & 15, pairs >> 4), -1).reshape(-1, _CODES)
    tiles = torch.empty_like(permuted)
    tiles[:, _order(str(packed.device))] = permuted
    return tiles.reshape(K // TILE, N // TILE, TILE, TILE).transpose(1, 2).reshape(K, N)


def permute_scales(scales: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Returns one expert's scales in Marlin's order.

    Args:
        scales: any dtype, `[K/group, N]`; N is a multiple of 64.
        interleaved: also in the order in which scales of 8 bits are converted to 16.
    """
    order = _scale_order(scales.shape[0] > 1, interleaved)
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)


def unpermute_scales(scales: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Returns the scales of `permute_scales` in their own order."""
    order = _scale_order(scales.shape[0] > 1, interleaved)
    blocks = scales.reshape(-1, len(order))
    own = torch.empty_like(blocks)
    own[:, order] = blocks
    return own.reshape(scales.shape)


def permute_bias(bias: torch.Tensor) -> torch.Tensor:
    """Returns one expert's bias `[N]` in Marlin's order."""
    return bias.reshape(-1, 32)[:, _scale_order(False, False)].reshape(bias.shape)


@cache
def _order(device: str) -> torch.Tensor:
    """Returns the place in four tiles of each code that Marlin reads, in its order: int64 `[1024]`."""
    order = [
        TILE * row + column + 8 * half + TILE * TILE * tile
        for column, first in ((thread // 4, 2 * (thread % 4)) for thread in range(32))
        for tile in range(4)
        for half in (0, 1)
        for row in (first, first + 1, first + 8, first + 9)
    ]
    # within eight codes, those with even places come first
    even_first = torch.tensor(order).reshape(-1, _PACK)[:, [0, 2, 4, 6, 1, 3, 5, 7]]
    return even_first.reshape(-1).to(device)


@cache
def _scale_order(several: bool, interleaved: bool) -> list[int]:
    """Returns the place of each scale that Marlin reads; `several`: whether a column has more than one scale."""
    if not several:
        return [2 * first + offset for first in range(4) for offset in (0, 1, 8, 9, 16, 17, 24, 25)]
    order = [first + 8 * block for first in range(8) for block in range(8)]
    if interleaved:
        order = [order[4 * quarter + place] for quarter in range(16) for place in (0, 2, 1, 3)]
    return order
