"""The fields of Humming's `LayerConfig` for a GEMM, by which its kernels are compiled ahead."""

from __future__ import annotations

from typing import Any, Final

from moetune.backends.humming.gemm import Gemm

CODE_DTYPES: Final = {"bf16": "uint4", "e8m0": "float4e2m1", "e4m3": "float4e2m1"}
SCALE_DTYPES: Final = {"bf16": "bfloat16", "e8m0": "float8e8m0", "e4m3": "float8e4m3"}
"""Humming's names, by `Format.scale`."""


def layer_fields(gemm: Gemm, capability: tuple[int, int]) -> dict[str, Any]:
    """Returns the fields of `LayerConfig` with which vLLM runs a GEMM, all other fields having their defaults."""
    return {
        "sm_version": capability[0] * 10 + capability[1],
        "shape_n": gemm.padded_columns,
        "shape_k": gemm.padded_depth,
        "pad_shape_n": gemm.padded_columns - gemm.columns,
        "pad_shape_k": gemm.padded_depth - gemm.depth,
        "num_experts": gemm.num_experts,
        "a_dtype": "bfloat16",
        "b_dtype": CODE_DTYPES[gemm.format.scale],
        "bs_dtype": SCALE_DTYPES[gemm.format.scale],
        "c_dtype": "bfloat16",
        "weight_scale_group_size": gemm.format.group,
        "weight_scale_2_type": "tensor" if gemm.format.scale == "e4m3" else None,
        "has_bias": gemm.bias,
    }
