"""The words that a layer and a regime are asked in: no pydantic here, so that the command line names them at once."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class Precision(StrEnum):
    """How the expert weights are stored and multiplied; activations are bf16 where nothing else is said."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8_BLOCK = "fp8_block"  # e4m3, one f32 scale for each 128×128 of a weight and each 1×128 of an activation
    FP8_TENSOR = "fp8_tensor"  # e4m3, one f32 scale a tensor
    NVFP4 = "nvfp4"  # e2m1, one e4m3 scale for each 16 values
    MXFP4 = "mxfp4"  # e2m1, one e8m0 scale for each 32 values
    MXINT4 = "mxint4"


Dispatch = Literal["none", "alltoall", "allgather"]
Layout = Literal["packed", "deduplicated", "slot", "pool"]
Strategy = Literal["auto", "exhaustive"]
"""`auto`: the backend's own search."""

DISPATCHES: tuple[Dispatch, ...] = ("none", "alltoall", "allgather")
LAYOUTS: tuple[Layout, ...] = ("packed", "deduplicated", "slot", "pool")
STRATEGIES: tuple[Strategy, ...] = ("auto", "exhaustive")
DISTRIBUTIONS = ("balanced", "random")
DISTRIBUTION_VARIABLE = "TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION"
DEFAULT_TUNE_MAX_NUM_TOKENS = 8192
