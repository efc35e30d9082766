"""Maps quantization schemes to `Precision`, or to None if the scheme is unknown.

Sources: vLLM 0.33.0, `model_executor/layers/quantization/` (`fp8.py`, `compressed_tensors/compressed_tensors_moe/`,
`modelopt.py`, `auto_awq.py`, `auto_gptq.py`, `quark/`, `inc/`, `fbgemm_fp8.py`); SGLang 0.5.23,
`srt/layers/quantization/modelopt_quant.py`; transformers 5.24.0, `utils/quantization_config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moetune.inputs.hf_fields import Config
from moetune.spec.enums import Precision

MODELOPT: Mapping[str, Precision] = {
    "NVFP4": Precision.NVFP4,
    "NVFP4_AWQ": Precision.NVFP4,  # activations are scaled before they are quantized (SGLang modelopt_quant.py)
    "W4A16_NVFP4": Precision.NVFP4_A16,
    "FP8": Precision.FP8_TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": Precision.FP8_CHANNEL,
    "FP8_PB_WO": Precision.FP8_BLOCK,
    "FP8_BLOCK_SCALES": Precision.FP8_BLOCK,
    "MXFP8": Precision.MXFP8,
    "W4A16_AWQ": Precision.AWQ_INT4,
    "W4A16_GPTQ": Precision.GPTQ_INT4,
    "W4A8_AWQ": Precision.W4A8,
    "W4A16_MXFP4": Precision.MXFP4,
    "W4A8_MXFP4_FP8": Precision.MXFP4,
    "W4A8_MXFP4_MXFP8": Precision.MXFP4,
    "W8A16": Precision.INT8_W8A16,
}
"""Maps ModelOpt's `quant_algo` to a precision."""


def fp8(scheme: Config) -> Precision | None:
    """Returns the precision of `quant_method: fp8`, which has one scale a tensor without `weight_block_size`."""
    match scheme.get("weight_block_size"):
        case None:
            return Precision.FP8_TENSOR
        case [128, 128]:
            return Precision.FP8_BLOCK
        case [64, 64]:
            return Precision.FP8_BLOCK_64
        case [1, 32]:
            return Precision.MXFP8
    return None


def gptq(scheme: Config) -> Precision | None:
    """Returns the precision of `quant_method: gptq`."""
    match scheme.get("bits"):
        case 4:
            return Precision.GPTQ_INT4
        case 8:
            return Precision.GPTQ_INT8
    return None


def compressed_tensors(group: Config) -> Precision | None:
    """Returns the precision of one of compressed-tensors' `config_groups`.

    If `input_activations` is null, activations are not quantized. If the key is missing, they are as is usual for the
    weights.
    """
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        return None
    kind = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    size, inputs = weights.get("group_size"), _inputs(group)
    weights_only = "input_activations" in group and inputs is None
    match kind:
        case "float", 8, ("tensor" | "channel" | "block" | "group") if weights_only:
            return None
        case "float", 8, "tensor":
            return Precision.FP8_TENSOR
        case "float", 8, "channel":
            return Precision.FP8_CHANNEL
        case "float", 8, "block":
            return fp8({"weight_block_size": _block(weights.get("block_structure"))})
        case "float", 8, "group" if size == 32:
            return Precision.MXFP8
        case "float", 4, "tensor_group" if size == 16:
            return Precision.NVFP4_A16 if weights_only else Precision.NVFP4
        case "float", 4, "group" if size == 32:
            return Precision.MXFP4
        case "int", 4 | 8, _:
            return _int_weights(weights, inputs)
    return None


def quark(scheme: Config) -> Precision | None:
    """Returns the precision of an entry of Quark's `layer_quant_config`, or of its `global_quant_config`."""
    weight = scheme.get("weight")
    if isinstance(weight, list) and len(weight) == 1:
        weight = weight[0]
    if not isinstance(weight, Mapping):
        return None
    match weight.get("dtype"), weight.get("qscheme"), weight.get("group_size"):
        case "fp4", "per_group", 32:
            return Precision.MXFP4
        case (("fp8" | "fp8_e4m3"), "per_tensor", _):
            return Precision.FP8_TENSOR
        case (("fp8" | "fp8_e4m3"), "per_channel", _):
            return Precision.FP8_CHANNEL
        case "int8", ("per_tensor" | "per_channel"), _:
            return Precision.INT8_W8A8 if scheme.get("input_tensors") else Precision.INT8_W8A16
    return None


def _awq(scheme: Config) -> Precision | None:
    return Precision.AWQ_INT4 if _int(scheme.get("bits", scheme.get("w_bit", 4))) == 4 else None


def _bitsandbytes(scheme: Config) -> Precision | None:
    if scheme.get("load_in_8bit"):
        return Precision.BNB_8BIT
    return Precision.BNB_4BIT if scheme.get("load_in_4bit") else None


def _auto_round(scheme: Config) -> Precision | None:
    is_plain = scheme.get("sym", True) and str(scheme.get("data_type", "int")) == "int"
    fits = _int(scheme.get("bits")) == 4 and _int(scheme.get("group_size")) == 128
    return Precision.INT4_G128 if is_plain and fits else None


METHODS: Mapping[str, Callable[[Config], Precision | None]] = {
    "mxfp4": lambda _: Precision.MXFP4,
    "mxfp8": lambda _: Precision.MXFP8,
    "fp8": fp8,
    "deepseek-v4-fp8": fp8,
    "fbgemm-fp8": lambda _: Precision.FP8_CHANNEL,
    "ptpc-fp8": lambda _: Precision.FP8_CHANNEL,
    "awq": _awq,
    "awq-marlin": _awq,
    "gptq": gptq,
    "gptq-marlin": gptq,
    "bitsandbytes": _bitsandbytes,
    "auto-round": _auto_round,
    "experts-int8": lambda _: Precision.INT8_W8A16,
}
"""Maps each `quant_method` with a single scheme (`-` written for `_`) to the function that reads it."""


def _int_weights(weights: Config, inputs: Config | None) -> Precision | None:
    match (
        weights.get("num_bits"),
        weights.get("strategy"),
        weights.get("group_size"),
        inputs and inputs.get("num_bits"),
    ):
        case 4, "group", 32, None if weights.get("symmetric"):
            return Precision.MXINT4
        case 4, "group", 128, None if weights.get("symmetric", True):
            return Precision.INT4_G128
        case 4, "group", 128, 8 if inputs and inputs.get("type") == "float":
            return Precision.W4A8
        case 8, ("channel" | "tensor"), _, None:
            return Precision.INT8_W8A16
        case 8, ("channel" | "tensor"), _, 8 if inputs and inputs.get("type") == "int":
            return Precision.INT8_W8A8
    return None


def _inputs(group: Config) -> Config | None:
    inputs = group.get("input_activations")
    return inputs if isinstance(inputs, Mapping) else None


def _block(structure: Any) -> Any:
    """Returns the sides of a block: `[128, 128]` for `"128x128"`, which some checkpoints have instead."""
    if isinstance(structure, str) and len(structure) < 16 and structure.replace("x", "").isdecimal():
        return [int(side) for side in structure.split("x") if side]
    return structure if structure is not None else ()


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None
