"""The allowed values of layer and regime fields. Does not import pydantic, so the command line starts quickly."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class Precision(StrEnum):
    """How the expert weights are stored and multiplied. Activations are bf16 unless noted.

    From `FP8_BLOCK_64` on, precisions can be read from a config and planned, but no backend tunes them but `W4A8`.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8_BLOCK = "fp8_block"  # e4m3, one f32 scale for each 128×128 of a weight and each 1×128 of an activation
    FP8_TENSOR = "fp8_tensor"  # e4m3, one f32 scale a tensor
    NVFP4 = "nvfp4"  # e2m1, one e4m3 scale for each 16 values
    MXFP4 = "mxfp4"  # e2m1, one e8m0 scale for each 32 values
    MXINT4 = "mxint4"  # w4a16: int4, one bf16 scale for each 32 values, no zero points
    NVFP4_A16 = "nvfp4_a16"  # nvfp4 weights, activations of 16 bits
    INT4_G128 = "int4_g128"  # w4a16: int4, one 16-bit scale for each 128 values, no zero points
    FP8_BLOCK_64 = "fp8_block_64"  # as fp8_block, with 64×64 and 1×64
    FP8_CHANNEL = "fp8_channel"  # e4m3, one scale for each output of a weight and each row of an activation
    MXFP8 = "mxfp8"  # e4m3, one e8m0 scale for each 32 values of weights and activations
    AWQ_INT4 = "awq_int4"  # w4a16 as AWQ stores it: scale and zero point for each group, mostly of 128 values
    GPTQ_INT4 = "gptq_int4"  # w4a16 as GPTQ stores it: scale and zero point for each group, mostly of 128 values
    GPTQ_INT8 = "gptq_int8"  # w8a16 as GPTQ stores it
    BNB_4BIT = "bnb_4bit"  # bitsandbytes: nf4 or fp4, one f32 scale for each 64 values
    BNB_8BIT = "bnb_8bit"  # bitsandbytes: LLM.int8()
    INT8_W8A16 = "int8_w8a16"  # int8 weights, one scale a channel
    INT8_W8A8 = "int8_w8a8"  # int8 weights and activations, one scale a channel and a row
    W4A8 = "w4a8"  # int4 weights, one scale for each 128 values; e4m3 activations


Dispatch = Literal["none", "alltoall", "allgather"]
Layout = Literal["packed", "deduplicated", "slot", "pool", "batched"]
Strategy = Literal["auto", "exhaustive"]
"""`auto`: the backend's own search."""

DISPATCHES: tuple[Dispatch, ...] = ("none", "alltoall", "allgather")
LAYOUTS: tuple[Layout, ...] = ("packed", "deduplicated", "slot", "pool", "batched")
STRATEGIES: tuple[Strategy, ...] = ("auto", "exhaustive")
DISTRIBUTIONS = ("balanced", "random")
SKEWED_DISTRIBUTIONS = ("ddist:X", "zipf:S", "powerlaw:A")
"""Distributions with a parameter; `spec/distribution.py` reads them."""
REPLAY = "replay:PATH[@LAYER]"
"""How a recording is spelled as a distribution."""
DISTRIBUTION_VARIABLE = "TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION"
DEFAULT_TUNE_MAX_NUM_TOKENS = 8192
DEFAULT_BATCHED_TOKENS = 256
"""The most tokens of a rank in one step in the layout batched: vLLM's `DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP`
(0.26 … 0.33)."""

Eplb = Literal["vllm", "sglang", "trtllm"]
"""The engine whose expert-parallel load balancer places the copies of experts."""

ENGINE_TITLES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
"""The engines, and how their names are written."""

Objective = Literal["mean", "worst"]
OBJECTIVES: tuple[Objective, ...] = ("mean", "worst")
"""What a choice minimizes under several distributions: the weighted mean of the slowdowns, or the worst one."""

RankWord = Literal["mean", "fullest"]
RANK_WORDS: tuple[RankWord, ...] = ("mean", "fullest")
"""The rank whose load is nearest the mean of all ranks; the rank that has most to compute."""
