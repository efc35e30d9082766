"""Reads TensorRT-LLM's own flags, settings and variables (`trtllm-serve`, `trtllm-bench`, `TorchLlmArgs`).

`--config` (formerly `--extra_llm_api_options`) names a settings file. A setting of this file overrides the flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import settings_file
from moetune.inputs.dispatcher import trtllm_name
from moetune.inputs.launch_line import TRUE, Line, number
from moetune.inputs.launch_model import Deployed
from moetune.inputs.settings_file import setting

DECIDING: Final = (
    "tp-size", "ep-size", "tensor-parallel-size", "moe-expert-parallel-size", "expert-parallel-size", "tp", "ep",
    "max-num-tokens", "enable-attention-dp", "extra-llm-api-options", "config", "extra-engine-args",
)  # fmt: skip
_FILES: Final = ("extra-llm-api-options", "config", "extra-engine-args")
_KERNELS: Final = {"cutlass": "flashinfer-cutlass", "wideep": "flashinfer-cutlass", "trtllm": "flashinfer-trtllm"}
_ROWS_OF_ALL_RANKS: Final = ("allgather", "nvlink_one_sided", "nvlink_two_sided", "deepep")
"""The dispatchers whose buckets count the rows of all ranks. `max_num_tokens` counts the rows of one rank."""
_DEFAULT_TOKENS: Final = 8192
"""The default of `TorchLlmArgs.max_num_tokens`."""


def options(line: Line, deployed: Deployed) -> dict[str, Any]:
    """Returns the options for a line of TensorRT-LLM.

    Raises:
        UsageError: a value is invalid.
        UnsupportedError: moetune does not tune the selected kernels.
    """
    path = line.text(*_FILES)
    settings = settings_file.read(path, "--extra_llm_api_options") if path else {}
    tp = _number(settings, "tensor_parallel_size") or line.number("tp-size", "tensor-parallel-size", "tp") or 1
    ep = _experts_over(line, settings, tp)
    given = setting(settings, "enable_attention_dp")
    own_tokens = line.switch("enable-attention-dp") if given is None else str(given).lower() in TRUE
    word = "none"
    if own_tokens:
        forced = line.variable("TRTLLM_FORCE_COMM_METHOD") or line.variable("TRTLLM_FORCE_ALLTOALL_METHOD")
        word = trtllm_name(forced) if forced else "attention_dp"
    elif line.variable("TRTLLM_FORCE_COMM_METHOD"):
        deployed.warn("TRTLLM_FORCE_COMM_METHOD has no effect without enable_attention_dp: every rank holds all rows.")
    rows = _number(settings, "max_num_tokens") or line.number("max-num-tokens")
    if own_tokens and (tp > ep or word in _ROWS_OF_ALL_RANKS):
        rows = (rows or _DEFAULT_TOKENS) * tp
    return {
        "ep": ep,
        "tp": tp // ep,
        "dispatch": f"trtllm:{word}",
        "redundant_experts": _replicas(settings, deployed),
        "tune_max_num_tokens": rows,
        "backend": _backend(settings, deployed, own_tokens=own_tokens),
    }


def _experts_over(line: Line, settings: Mapping[str, Any], tp: int) -> int:
    """Returns the number of ranks that share the experts, from the EP size or the MoE TP size."""
    ep = _number(settings, "moe_expert_parallel_size") or line.number(
        "ep-size", "moe-expert-parallel-size", "expert-parallel-size", "ep"
    )
    moe_tp = _number(settings, "moe_tensor_parallel_size")
    if ep is None and moe_tp is not None:
        ep = max(1, tp // moe_tp)
    ep = ep or 1
    if tp % ep or (moe_tp is not None and ep * moe_tp != tp):
        raise UsageError(
            f"TensorRT-LLM's ep_size {ep}{f' and moe_tensor_parallel_size {moe_tp}' if moe_tp else ''} "
            f"must divide tp_size {tp}.",
            "Correct these sizes.",
        )
    return ep


def _number(settings: Mapping[str, Any], name: str) -> int | None:
    value = setting(settings, name)
    return None if value is None else number(str(value), name)


def _replicas(settings: Mapping[str, Any], deployed: Deployed) -> int | None:
    """Returns the number of redundant experts that `moe_config.load_balancer` sets, an object or the path of a file."""
    balancer = setting(settings, "moe_config", "load_balancer")
    if isinstance(balancer, str):
        balancer = settings_file.read(balancer, "moe_config.load_balancer")
    slots = None if balancer is None else setting(balancer, "num_slots")
    if slots is None:
        return None
    replicas = number(str(slots), "moe_config.load_balancer.num_slots") - deployed.layer.num_experts
    if replicas < 0:
        raise UsageError(
            f"moe_config.load_balancer.num_slots = {slots} is less than the {deployed.layer.num_experts} experts of "
            f"{deployed.layer.name}.",
            "Set it to the number of experts, plus the redundant ones.",
        )
    return replicas or None


def _backend(settings: Mapping[str, Any], deployed: Deployed, *, own_tokens: bool) -> str | None:
    if "backend" in deployed.beside:
        return str(deployed.beside["backend"])
    named = setting(settings, "moe_config", "backend")
    if named is None or str(named).lower() == "auto":
        return None
    backend = _KERNELS.get(str(named).lower())
    if backend is None:
        raise UnsupportedError(
            f"moe_config.backend {named} selects MoE kernels that moetune does not tune.",
            f"Pass --backend to override it. Tunable: {', '.join(_KERNELS).upper()}.",
        )
    return f"{backend}-routed" if own_tokens and backend == "flashinfer-trtllm" else backend
