"""Reads vLLM's own flags and variables (vLLM 0.33).

With expert parallelism ep = tp · dp · pcp; without, each expert is split over as many ranks
(`FusedMoEParallelConfig.make`). The largest row count of FlashInfer's ops is that of `fi_moe_largest_bucket` (#47427,
#52989). With a dispatcher of expert-major rows an expert's block has as many rows as all ranks may have tokens in one
step (`DeepEPLLPrepareAndFinalize`).
"""

from __future__ import annotations

from typing import Any, Final

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.engine_flags import backend_of
from moetune.inputs.launch_line import TRUE, Line, number
from moetune.inputs.launch_model import Deployed
from moetune.spec.enums import DEFAULT_BATCHED_TOKENS, DEFAULT_TUNE_MAX_NUM_TOKENS, Precision

DECIDING: Final = (
    "tensor-parallel-size", "data-parallel-size", "prefill-context-parallel-size", "enable-expert-parallel",
    "all2all-backend", "enable-eplb", "eplb-config", "moe-backend", "max-num-batched-tokens", "quantization", "dtype",
    "hf-overrides", "expert-placement-strategy", "performance-mode",
)  # fmt: skip
_FLASHINFER_SWITCHES: Final = {
    "FP16": (Precision.BF16, Precision.FP16),
    "FP8": (Precision.FP8_BLOCK, Precision.FP8_TENSOR),
    "FP4": (Precision.NVFP4,),
    "MXFP4_MXFP8": (Precision.MXFP4,),
    "MXFP4_BF16": (Precision.MXFP4,),
    "MXFP4_MXFP8_CUTLASS": (Precision.MXFP4,),
}
"""Maps the switches `VLLM_USE_FLASHINFER_MOE_…` of vLLM up to 0.2x to the precisions that they apply to."""
_FLASHINFER: Final = {"latency": "flashinfer-trtllm", "throughput": "flashinfer-cutlass"}
BATCHED: Final = ("deepep_low_latency", "nixl_ep")
"""The dispatchers that give the kernel expert-major rows (`ParallelConfig.use_batched_dp_moe`)."""
_DEFAULT_TOKENS: Final = {"flashinfer-trtllm": 16384, "flashinfer-trtllm-routed": 16384}
"""The default of `EngineArgs.get_batch_defaults`: 16384 from 160 GiB of GPU memory (B200, B300); 8192 on an H100 or
H200."""


def options(line: Line, deployed: Deployed) -> dict[str, Any]:
    """Returns the options for a `vllm serve` line.

    Raises:
        UsageError: a value is invalid.
        UnsupportedError: moetune does not support the selected kernels or expert placement.
    """
    tp = line.number("tensor-parallel-size", default=1) or 1
    dp = line.number("data-parallel-size", default=1) or 1
    world = tp * dp * (line.number("prefill-context-parallel-size", default=1) or 1)
    experts = line.switch("enable-expert-parallel")
    word = line.text("all2all-backend") or line.variable("VLLM_ALL2ALL_BACKEND")
    if not experts or dp == 1 or word is None:
        word = "allgather_reducescatter"
    replicas = _replicas(line)
    _warn_of_refused_eplb(line, deployed, replicas, world if experts else 1)
    _require_linear_placement(line, deployed, experts=experts, replicas=replicas)
    batched = word in BATCHED
    backend = _backend(line, deployed, batched=batched)
    on_flashinfer = (backend or "").startswith("flashinfer") or word.startswith("flashinfer")
    return {
        "ep": world if experts else 1,
        "tp": 1 if experts else world,
        "dispatch": f"vllm:{word}",
        "dp": None if dp > 1 else False,
        "redundant_experts": replicas or None,
        "tune_max_num_tokens": None if batched else _largest_bucket(line, dp, backend, on_flashinfer=on_flashinfer),
        "backend": backend,
        "ladder": str(_batched_tokens(line) * world) if batched else "hybrid" if on_flashinfer else None,
    }


def _batched_tokens(line: Line) -> int:
    """Returns the most tokens of a rank in one step with a dispatcher of expert-major rows.

    The source is `_set_default_max_num_seqs_and_batched_tokens_args` of vLLM 0.33's `engine/arg_utils.py`.
    """
    default = DEFAULT_BATCHED_TOKENS * (2 if line.text("performance-mode") == "throughput" else 1)
    return line.number("max-num-batched-tokens") or default


def _largest_bucket(line: Line, dp: int, backend: str | None, *, on_flashinfer: bool) -> int | None:
    """Returns the largest row count that the engine's own tuner covers."""
    tokens = line.number("max-num-batched-tokens")
    if not on_flashinfer:
        return None if tokens is None else tokens * dp
    if tokens is None:
        tokens = _DEFAULT_TOKENS.get(backend or "", 8192) * (2 if line.text("performance-mode") == "throughput" else 1)
    return max(DEFAULT_TUNE_MAX_NUM_TOKENS, dp * tokens)


def _replicas(line: Line) -> int:
    config = line.object("eplb-config") or {}
    own = line.number("num-redundant-experts", default=0, least=0) or 0
    replicas = number(str(config.get("num_redundant_experts", own)), "--eplb-config.num_redundant_experts", least=0)
    if replicas and not line.switch("enable-eplb"):
        raise UsageError(
            f"--eplb-config sets {replicas} redundant experts without --enable-eplb, which vLLM refuses.",
            "Add --enable-eplb, or leave the redundant experts out.",
        )
    return replicas


def _warn_of_refused_eplb(line: Line, deployed: Deployed, replicas: int, ranks: int) -> None:
    """Adds a warning if vLLM would refuse to start (`ParallelConfig._validate_parallel_config`, `FusedMoE`)."""
    if not line.switch("enable-eplb"):
        return
    slots = deployed.layer.num_experts + replicas
    if ranks == 1:
        deployed.warn("vLLM refuses --enable-eplb without --enable-expert-parallel over more than one GPU.")
    elif slots % ranks:
        deployed.warn(f"vLLM refuses --enable-eplb if {ranks} ranks do not divide the {slots} physical experts.")


def _require_linear_placement(line: Line, deployed: Deployed, *, experts: bool, replicas: int) -> None:
    """Raises `UnsupportedError` if vLLM may place the experts of a grouped router in turn instead of in shards.

    vLLM does so without redundant experts (`expert_map_manager.py`). 0.33 uses shards with most dispatchers, earlier
    versions did not. For an ungrouped router the load is the same either way.
    """
    if line.text("expert-placement-strategy") != "round_robin" or not experts:
        return
    if deployed.layer.routing.num_groups > 1 and not replicas and not line.switch("enable-eplb"):
        raise UnsupportedError(
            "--expert-placement-strategy round_robin: which experts a rank then holds depends on vLLM's version and "
            "dispatcher, and moetune supports contiguous shards only.",
            "Launch with --expert-placement-strategy linear.",
        )


def _backend(line: Line, deployed: Deployed, *, batched: bool) -> str | None:
    if "backend" in deployed.beside:
        return str(deployed.beside["backend"])
    if _true(line.variable("VLLM_ROCM_USE_AITER")) and _true(line.variable("VLLM_ROCM_USE_AITER_MOE") or "1"):
        raise UnsupportedError(
            "VLLM_ROCM_USE_AITER selects AITER's MoE kernels, which moetune does not tune.",
            "Pass --backend to tune other kernels.",
        )
    named = line.text("moe-backend")
    if batched and named is not None and named.replace("-", "_") in ("triton", "batched_triton"):
        return "batched-triton"
    if named == "triton" and deployed.layer.precision is Precision.MXFP4:
        return "triton-kernels"
    if named not in (None, "auto"):
        return backend_of(str(named), "--moe-backend")
    return _backend_of_variables(line, deployed)


def _backend_of_variables(line: Line, deployed: Deployed) -> str | None:
    """Returns the backend that `VLLM_USE_FLASHINFER_MOE_…` selects (vLLM up to 0.2x)."""
    for switch, precisions in _FLASHINFER_SWITCHES.items():
        name = f"VLLM_USE_FLASHINFER_MOE_{switch}"
        if not _true(line.variable(name)) or deployed.layer.precision not in precisions:
            continue
        deployed.warn(f"vLLM 0.33 does not read {name}; use --moe-backend instead.")
        if switch.startswith("MXFP4"):
            return "flashinfer-cutlass" if switch.endswith("CUTLASS") else "flashinfer-trtllm"
        chosen = line.variable("VLLM_FLASHINFER_MOE_BACKEND")
        if chosen is None or chosen.lower() not in _FLASHINFER:
            raise UsageError(
                f"{name} with VLLM_FLASHINFER_MOE_BACKEND={chosen or 'unset'} does not determine which kernels run; "
                f"its default changed between versions.",
                f"Set it to {' or '.join(_FLASHINFER)}, or pass --backend.",
            )
        return _FLASHINFER[chosen.lower()]
    return None


def _true(value: str | None) -> bool:
    return value is not None and value.lower() in TRUE
