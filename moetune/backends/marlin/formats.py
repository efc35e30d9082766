"""Describes the formats of 4-bit weights that Marlin multiplies with bf16 activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from moetune.spec.enums import Precision

Scale = Literal["bf16", "e8m0", "e4m3"]
_INTEGERS: Final = tuple(float(value) for value in range(-8, 8))
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGNED_E2M1: Final = (*_E2M1, *(-value for value in _E2M1))


@dataclass(frozen=True, slots=True)
class Format:
    """One format of weights.

    Attributes:
        name: for messages.
        values: the number that each of the 16 codes stands for.
        zero: the code of 0, with which matrices are padded.
        group: the values along K that share a scale.
        scale: how scales are stored. `e4m3` has another scale, f32, for each expert.
        scalar_type: vLLM's number of the codes' type (`ScalarType.id`): uint4b8 or float4_e2m1f.
    """

    name: str
    values: tuple[float, ...]
    zero: int
    group: int
    scale: Scale
    scalar_type: int

    def padded(self, hidden_size: int, intermediate_size: int) -> tuple[int, int] | None:
        """Returns the sizes to which vLLM 0.26 and 0.33 pad H and I/tp; None if they refuse these sizes.

        Sources: `check_moe_marlin_supports_layer` and `marlin_moe_padded_intermediate` (int4),
        `mxfp4_round_up_hidden_size_and_intermediate_size` (mxfp4), `prepare_nvfp4_moe_layer_for_marlin` (nvfp4).
        """
        if intermediate_size % self.group or hidden_size % self.group:
            return None
        if self.scale == "e8m0":
            return _up(hidden_size, 256), _up(intermediate_size, 128)
        if hidden_size % 128 == 0:
            return hidden_size, _up(intermediate_size, math.lcm(64, self.group))
        if hidden_size % 64 == 0 and self.scale == "e4m3":
            return hidden_size, _up(intermediate_size, 128)
        return None


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# `ScalarType.id`: exponent (8 bits), mantissa (8), sign (1), bias (32), finite values only (1), kind of NaN (8)
_UINT4B8: Final = 1 << 50 | 8 << 17 | 4 << 8
_FLOAT4_E2M1F: Final = 1 << 49 | 1 << 16 | 1 << 8 | 2
_MXINT4: Final = Format("int4 in groups of 32", _INTEGERS, 8, 32, "bf16", _UINT4B8)
_NVFP4: Final = Format("nvfp4", _SIGNED_E2M1, 0, 16, "e4m3", _FLOAT4_E2M1F)
FORMATS: Final[Mapping[Precision, Format]] = {
    Precision.MXINT4: _MXINT4,
    Precision.INT4_G128: Format("int4 in groups of 128", _INTEGERS, 8, 128, "bf16", _UINT4B8),
    Precision.MXFP4: Format("mxfp4", _SIGNED_E2M1, 0, 32, "e8m0", _FLOAT4_E2M1F),
    Precision.NVFP4: _NVFP4,
    Precision.NVFP4_A16: _NVFP4,
}
"""The format of each precision whose weights Marlin takes. Its activations are bf16 in all of them."""
