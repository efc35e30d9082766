"""Maps backends to the flags by which engines select them.

vLLM 0.33 has `--moe-backend`, with the values of `MoEBackend` in `config/kernel.py`. SGLang 0.5.23 has
`--moe-runner-backend`, with the values of `MOE_RUNNER_BACKEND_CHOICES` in `srt/server_args.py`. TensorRT-LLM has
`MoeConfig.backend` in `llmapi/llm_args.py`, a setting of the file that `--config` (formerly `--extra_llm_api_options`)
names. No value of it selects FlashInfer's CUTLASS kernels, because TensorRT-LLM has its own copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from moetune.errors import UnsupportedError
from moetune.spec.enums import ENGINE_TITLES, Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

ENGINES: Final = tuple(ENGINE_TITLES)
_VLLM: Final = {
    "triton": "triton",
    "batched-triton": "triton",
    "flashinfer-cutlass": "flashinfer_cutlass",
    "flashinfer-fp8-block": "flashinfer_cutlass",
    "flashinfer-trtllm": "flashinfer_trtllm",
    "flashinfer-trtllm-routed": "flashinfer_trtllm",
    "triton-kernels": "triton",
    "humming": "humming",
    "marlin": "marlin",
    "deep-gemm": "deep_gemm",
    "batched-deep-gemm": "deep_gemm",
    "vllm-cutlass": "cutlass",
}
"""vLLM has one value for both Triton kernels and one for both of DeepGEMM's, and runs the batched ones on expert-major
rows (`fused_moe/oracle/`). For mxfp4 experts Triton's value means triton_kernels (`oracle/mxfp4.py`).

It has one value for both TensorRT-LLM ops too. It uses the routed one if tokens travel with their ids.
"""
_SGLANG: Final = {
    "triton": "triton",
    "flashinfer-cutlass": "flashinfer_cutlass",
    "flashinfer-trtllm": "flashinfer_trtllm",
    "flashinfer-trtllm-routed": "flashinfer_trtllm_routed",
    "marlin": "marlin",
}
_SGLANG_MXFP4: Final = "flashinfer_mxfp4"
"""SGLang's value for mxfp4 experts. It runs trtllm-gen kernels on Blackwell and CUTLASS kernels on Hopper."""
_VALUES: Final = {value: backend for backend, value in _SGLANG.items()}
_VLLM_FLAG: Final = "--moe-backend"
_VLLM_ALONE: Final = {"humming": "humming"}
"""SGLang 0.5.23 has a value `humming` too, for humming-kernels 0.1.12, which moetune does not tune."""
TRITON: Final = ("triton", "batched-triton")
"""The backends whose tactics an engine reads from a file."""
FROM_LOGITS: Final = "flashinfer-trtllm"
"""The backend whose kernel chooses the experts of a token itself. To all others the engine passes their ids."""
WITH_IDS: Final = "flashinfer-trtllm-routed"
"""The backend of the same kernels that takes the ids."""
_TRTLLM: Final = (FROM_LOGITS, WITH_IDS)


def reaches(backend: str, layout: str | None) -> bool:
    """Returns whether an engine can run `backend` under a layout.

    The rows of a pool go to FlashInfer's kernels only, and expert-major rows to the batched kernels only. The source is
    `dispatchers.json`, which names those whose rows reach the Triton kernels.
    """
    if layout == "batched" or backend.startswith("batched-"):
        return layout == "batched" and backend.startswith("batched-")
    return layout != "pool" or backend.startswith("flashinfer")


def engine_flags(backend: str, precision: Precision, layout: str | None = None) -> Mapping[str, str]:
    """Returns the flag that selects `backend`, for each engine that can run it.

    >>> engine_flags("flashinfer-cutlass", Precision.BF16)
    {'vllm': '--moe-backend flashinfer_cutlass', 'sglang': '--moe-runner-backend flashinfer_cutlass'}

    Args:
        layout: the regime's layout. SGLang has no path from the rows of a pool to its kernels for mxfp4
            (`register_fused_func` in `moe_runner/flashinfer_cutlass.py`).
    """
    flags: dict[str, str] = {}
    if precision is Precision.W4A8:  # both engines run it with CUTLASS kernels of their own
        return flags
    if backend in _VLLM:
        flags["vllm"] = f"{_VLLM_FLAG} {_VLLM[backend]}"
    if backend in _SGLANG:
        mxfp4 = precision is Precision.MXFP4 and backend in (*_TRTLLM, "flashinfer-cutlass")
        if not (mxfp4 and layout == "pool"):
            flags["sglang"] = f"--moe-runner-backend {_SGLANG_MXFP4 if mxfp4 else _SGLANG[backend]}"
    if backend in _TRTLLM:
        flags["trtllm"] = "moe_config.backend: TRTLLM"
    return flags


def flags_of(engine: str, backends: Iterable[str], layer: MoELayer, regime: Regime) -> dict[str, str]:
    """Returns by backend the flag of `engine` that selects it, for those that the engine can run. No flag stands twice.

    A flag that selects several is that of the kernels that the engine runs: of the TensorRT-LLM ops the one with ids if
    tokens travel with their ids, and these ops rather than others if they can run at all.
    """
    with_ids = regime.dispatch != "none" or (engine == "trtllm" and regime.attention_dp)
    first = (WITH_IDS, FROM_LOGITS) if with_ids else (FROM_LOGITS, WITH_IDS)
    reaching = [name for name in backends if reaches(name, regime.layout)]
    found: dict[str, str] = {}
    for name in sorted(reaching, key=lambda name: first.index(name) if name in first else len(first)):
        flag = engine_flags(name, layer.precision, regime.layout).get(engine)
        if flag and flag not in found.values():
            found[name] = flag
    return found


def preferred_to_triton(
    engine: str, precision: Precision, ep_size: int, capability: int, layout: str | None = None
) -> str | None:
    """Returns the kernels that the engine prefers to Triton's by default, or None.

    The sources are `_get_priority_backends` in vLLM's `fused_moe/oracle/fp8.py` and `unquantized.py` (0.20 … 0.33), and
    SGLang's `arg_groups/overrides.py` (0.5.23).

    Args:
        capability: the major compute capability of the GPU: 9 for Hopper, 10 for Blackwell.
        layout: the regime's layout. On expert-major rows the batched kernels alone can run.
    """
    if layout == "batched":
        return "DeepGEMM's masked kernels" if precision is Precision.FP8_BLOCK else None
    if capability == 10 and engine == "vllm":
        return "FlashInfer's kernels"
    if capability == 10 and engine == "sglang":
        return "flashinfer_trtllm for many models"
    if capability == 9 and engine == "vllm" and precision is Precision.FP8_BLOCK and ep_size > 1:
        return "FlashInfer's CUTLASS kernel and DeepGEMM"
    return None


def backend_of(named: str, flag: str) -> str:
    """Returns moetune's backend for the value of vLLM's `--moe-backend` or SGLang's `--moe-runner-backend`.

    >>> backend_of("flashinfer_cutlass", "--moe-backend")
    'flashinfer-cutlass'

    Raises:
        UnsupportedError: moetune does not tune these kernels.
    """
    values = {**_VALUES, **_VLLM_ALONE} if flag == _VLLM_FLAG else _VALUES
    backend = {**values, _SGLANG_MXFP4: "flashinfer-trtllm"}.get(named.lower().replace("-", "_"))
    if backend is None:
        raise UnsupportedError(
            f"{flag} {named} selects MoE kernels that moetune does not tune.",
            f"Pass --backend to override it. Tunable: {', '.join(values)}.",
        )
    return backend
