"""Says which MoE kernels vLLM and SGLang choose for a launch line, and whether these read a tuned file.

Only Triton's GEMMs read one: the grouped one, and vLLM's batched one for expert-major rows. Sources: vLLM 0.26.0 and
0.33.0, `fused_moe/oracle/fp8.py` and `unquantized.py`, `experts/*.py`; SGLang 0.5.23, `create_moe_runner` of
`layers/quantization/fp8.py` and `unquant.py`, `arg_groups/moe_hook.py` and `arg_groups/overrides.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

from moetune.inputs.hopper_kernels import on_hopper
from moetune.inputs.launch_table import TableLine
from moetune.inputs.launch_vllm import BATCHED
from moetune.spec.enums import ENGINE_TITLES, Precision
from moetune.spec.layer import Activation

Reads = Literal["yes", "no", "unknown"]
_CAPABILITIES: Final = (
    (re.compile(r"\b(GH200|H\d{2,3})\b"), (9, 0)),
    (re.compile(r"\b(GB?|B)[123]00\b"), (10, 0)),
    (re.compile(r"\b(RTX 50\d\d|RTX PRO \d+|GB10)\b"), (12, 0)),
    (re.compile(r"\b(L4|L20|L40S?|RTX 40\d\d|Ada)\b"), (8, 9)),
    (re.compile(r"\b(A\d{2,3}\w*|RTX 30\d\d|RTX A\d+)\b"), (8, 0)),
)
"""Words of the names of GPUs, with the compute capability; the first that is found holds."""
_FP8: Final = (Precision.FP8_BLOCK, Precision.FP8_TENSOR)
_WIDE: Final = (Precision.BF16, Precision.FP16, Precision.FP32)
PRECISIONS: Final = (*_WIDE, *_FP8)
"""The precisions whose experts the grouped Triton GEMM runs."""
_SGLANG_DEEPGEMM: Final = ("deepep", "deepep_v2", "mooncake", "nixl", "pplx")
_OWN: Final = {
    "vllm": {
        "flashinfer_nvlink_one_sided": "FlashInfer's kernels",
        "flashinfer_nvlink_two_sided": "FlashInfer's kernels",
        "flashinfer_all2allv": "FlashInfer's kernels",
        "moonep": "PyTorch's grouped GEMM",
        "mori_high_throughput": "AITER's kernels",
        "mori_low_latency": "AITER's kernels",
    },
    "sglang": {
        "flashinfer": "FlashInfer's kernels",
        "megamoe": "DeepGEMM's MegaMoE kernel",
        "flashinfer_megamoe": "FlashInfer's MegaMoE kernel",
        "mori": "AITER's kernels",
        "ascend_fuseep": "Ascend's kernels",
        "ascend_tp": "Ascend's kernels",
    },
}
"""The kernels that a dispatcher needs, by engine and dispatcher. None of them reads a file."""
_DEEPGEMM_ROWS: Final = 128
"""The fewest rows that DeepGEMM takes (`_valid_deep_gemm_shape`) with scales that are no powers of two.

With the default, scales that are (`is_deep_gemm_e8m0_used`), `TritonOrDeepGemmExperts` takes DeepGEMM in any case.
"""
_DEEPGEMM_COLUMNS: Final = 512
"""Likewise, vLLM runs Triton instead of DeepGEMM up to this intermediate size (`_valid_deep_gemm`)."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The MoE kernels of a launch line.

    Attributes:
        name: what the engine runs.
        reads: whether they read a tuned file; `unknown` if that depends on what moetune does not know.
        why: a sentence that says why they run, or what it depends on.
        remedy: what to do so that the file is read; empty if it is read.
        most_rows: the largest row count with which the file is read; None: any.
    """

    name: str
    reads: Reads
    why: str
    remedy: str = ""
    most_rows: int | None = None


def capability_of(device: str) -> tuple[int, int] | None:
    """Returns the compute capability of a GPU by its name as torch reports it; None if the name is not known.

    >>> capability_of("NVIDIA H100 80GB HBM3")
    (9, 0)
    """
    spelled = device.replace("_", " ")
    return next((found for pattern, found in _CAPABILITIES if pattern.search(spelled)), None)


def block_shape(line: TableLine) -> tuple[int, int] | None:
    """Returns the scale block that is in a file's name; None without blocks.

    vLLM makes blocks smaller if 128 does not divide the intermediate size of a rank (`refine_fp8_moe_block_shape`).
    """
    if line.layer.precision is not Precision.FP8_BLOCK:
        return None
    if line.engine == "vllm" and line.intermediate_size % 128:
        refined = math.gcd(128, line.intermediate_size, line.layer.hidden_size)
        if refined >= 32:
            return (refined, refined)
    return (128, 128)


def chosen(line: TableLine, capability: tuple[int, int] | None) -> Kernels:
    """Returns the kernels that the engine chooses for a launch line.

    Args:
        capability: the compute capability of the GPU; None if it is not known.
    """
    engine = ENGINE_TITLES[line.engine]
    if line.ignores_files:
        return _no("Triton by its default configuration", line.ignores_files, "Leave that out.")
    if line.aiter:
        return _no("AITER's kernels", "The line selects them.", "Leave the variable out.")
    if line.layer.precision not in PRECISIONS:
        why = f"{engine} does not run {line.layer.precision.value} experts with the kernel that reads such files."
        known = on_hopper(line.engine, line.layer, line.regime) if line.regime and capability == (9, 0) else None
        name = known.name if known and known.name else f"kernels for {line.layer.precision.value}"
        return _no(name, why, "There is nothing to look up.")
    if (own := _OWN[line.engine].get(line.dispatcher)) is not None:
        plain = "--all2all-backend allgather_reducescatter" if line.engine == "vllm" else "--moe-a2a-backend none"
        return _no(own, f"The dispatcher {line.dispatcher} needs them.", f"Use {plain}.")
    return _vllm(line, capability) if line.engine == "vllm" else _sglang(line, capability)


def _triton(why: str, most_rows: int | None = None) -> Kernels:
    return Kernels("Triton", "yes", why, most_rows=most_rows)


def _batched(why: str) -> Kernels:
    return Kernels("batched Triton", "yes", why)


def _no(name: str, why: str, remedy: str) -> Kernels:
    return Kernels(name, "no", why, remedy)


def _vllm(line: TableLine, capability: tuple[int, int] | None) -> Kernels:
    remedy = "Start vLLM with --moe-backend triton."
    if line.named is not None:
        return _vllm_named(line, line.named.replace("-", "_"), capability, f"{line.flag} {line.named} selects them.")
    if capability is None:
        why = "vLLM chooses the kernels by the GPU, and moetune does not know this one."
        return Kernels("unknown kernels", "unknown", why, remedy)
    if line.layer.precision in _WIDE:
        return _vllm_wide(line, capability, remedy)
    if line.deep_gemm and line.layer.precision is Precision.FP8_BLOCK:
        return _vllm_named(line, "deep_gemm", capability, "VLLM_USE_DEEP_GEMM selects them.")
    if line.layer.precision is Precision.FP8_BLOCK:
        return _vllm_block(line, capability, remedy)
    if capability < (8, 9):
        return _no("Marlin", "This GPU has no fp8 instructions.", "Use a GPU that has them.")
    if line.quantized_online:
        return _triton("vLLM chooses Triton for experts that it quantizes itself, with one scale a tensor.")
    return Kernels(
        "Triton or CUTLASS kernels",
        "unknown",
        "vLLM prefers FlashInfer's kernels if the checkpoint has static scales for the activations, and its own "
        "CUTLASS kernels for a compressed-tensors checkpoint.",
        remedy,
    )


def _vllm_named(line: TableLine, named: str, capability: tuple[int, int] | None, why: str) -> Kernels:
    remedy = "Use --moe-backend triton instead."
    if named in ("triton", "batched_triton") and line.dispatcher in BATCHED:
        return _batched(why)
    if named in ("triton", "batched_triton") or (line.layer.precision in _WIDE and named in ("humming", "marlin")):
        return _triton(why)
    blackwell = capability is not None and capability >= (10, 0)
    if named == "deep_gemm" and not line.any_rows_deep_gemm and line.dispatcher not in BATCHED and not blackwell:
        small = line.intermediate_size <= _DEEPGEMM_COLUMNS or line.intermediate_size % 128
        if small:
            return _triton(f"{why} For an intermediate size of {line.intermediate_size} vLLM runs Triton instead.")
        return Kernels("DeepGEMM", "yes", f"{why} Below 128 rows vLLM runs Triton instead.", remedy, _DEEPGEMM_ROWS - 1)
    if named == "cutlass" and blackwell and line.dispatcher not in BATCHED:
        return Kernels("CUTLASS", "yes", f"{why} Up to 8 rows vLLM runs Triton instead.", remedy, 8)
    return _no("DeepGEMM" if named == "deep_gemm" else named, why, remedy)


def _vllm_wide(line: TableLine, capability: tuple[int, int], remedy: str) -> Kernels:
    precision = line.layer.precision.value
    if line.dispatcher in BATCHED:
        return _batched(f"vLLM runs {precision} experts of {line.dispatcher} with it, and looks it up by the capacity.")
    if capability < (10, 0) or line.layer.activation is Activation.SWIGLU_CLAMPED:
        return _triton(f"vLLM chooses Triton for {precision} experts on this GPU.")
    return _no("FlashInfer's kernels", f"vLLM prefers them for {precision} experts on this GPU.", remedy)


def _vllm_block(line: TableLine, capability: tuple[int, int], remedy: str) -> Kernels:
    if line.dispatcher in BATCHED:
        why = f"vLLM prefers its masked kernels for the expert-major rows of {line.dispatcher}."
        return _no("DeepGEMM", why, remedy)
    if block_shape(line) != (128, 128):
        return _triton("Only Triton takes scale blocks of this size.")
    if capability < (8, 9):
        return _no("Marlin", "This GPU has no fp8 instructions.", "Use a GPU that has them.")
    if capability >= (12, 0) or capability < (9, 0):
        return _triton("vLLM has no other kernel for fp8 blocks on this GPU.")
    if capability >= (10, 0):
        return _no("FlashInfer's kernels", "vLLM prefers them for fp8 blocks on this GPU.", remedy)
    if line.ep_size > 1:
        why = f"vLLM prefers them for fp8 blocks at EP {line.ep_size} on Hopper; without FlashInfer, DeepGEMM."
        return _no("FlashInfer's CUTLASS kernels", why, remedy)
    return _triton("vLLM chooses Triton for fp8 blocks without expert parallelism on Hopper.")


def _sglang(line: TableLine, capability: tuple[int, int] | None) -> Kernels:
    remedy = "Start SGLang with --moe-runner-backend triton."
    fp8 = line.layer.precision in _FP8
    if line.named is not None:
        return _sglang_named(line, line.named.replace("-", "_"))
    if line.dispatcher in _SGLANG_DEEPGEMM:
        why = f"SGLang runs it for the expert-major rows of {line.dispatcher}."
        return _no("DeepGEMM", why, "Use --moe-a2a-backend none.")
    if capability is None:
        why = "SGLang chooses the kernels by the GPU, and moetune does not know this one."
        return Kernels("unknown kernels", "unknown", why, remedy)
    if (10, 0) <= capability < (12, 0):
        why = "On Blackwell SGLang chooses flashinfer_trtllm for many models, and Triton for the others."
        return Kernels("FlashInfer's kernels or Triton", "unknown", why, remedy)
    return _triton(f"SGLang chooses Triton for {'fp8' if fp8 else line.layer.precision.value} experts on this GPU.")


def _sglang_named(line: TableLine, named: str) -> Kernels:
    why = f"{line.flag} {line.named} selects them."
    if named == "triton":
        return _triton(why)
    if line.layer.precision in _FP8:
        if named in ("flashinfer_cutlass", "flashinfer_cutedsl"):
            return _triton(f"SGLang has no {named} path for fp8 experts and runs Triton instead.")
    elif named in ("cutlass", "marlin", "aiter"):
        return _triton(f"SGLang has no {named} path for unquantized experts and runs Triton instead.")
    return _no(named, why, "Use --moe-runner-backend triton instead.")
