"""Finds vLLM's library of MoE kernels, and calls `moe_wna16_marlin_gemm` whichever arguments its version has.

The library is loaded by its path. vLLM itself is not imported, and needs none of its dependencies.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

NAMESPACE: Final = "_moe_C"
GEMM: Final = "moe_wna16_marlin_gemm"
LIBRARIES: Final = ("_moe_C_stable_libtorch.abi3.so", "_moe_C.abi3.so")
"""The library's file in vLLM's folder, the newest name first."""
KNOWN: Final = frozenset(
    {
        *("a", "c_or_none", "b_q_weight", "b_bias_or_none", "b_scales", "a_scales", "global_scale"),
        *("b_zeros_or_none", "g_idx_or_none", "perm_or_none", "workspace", "sorted_token_ids", "expert_ids"),
        *("num_tokens_past_padded", "topk_weights", "moe_block_size", "top_k", "mul_topk_weights", "b_type_id"),
        *("size_m", "size_n", "size_k", "is_full_k", "use_atomic_add", "use_fp32_reduce", "is_zp_float"),
        *("thread_k", "thread_n", "blocks_per_sm"),
    }
)
"""The op's arguments in vLLM 0.26.0. That of 0.33.0 lacks g_idx_or_none, perm_or_none and is_full_k."""
NEEDED: Final = frozenset({"thread_k", "thread_n", "blocks_per_sm", "a_scales", "moe_block_size", "b_type_id"})
"""Without these, an op of this name is that of an earlier vLLM or of another library."""
_FIXED: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("a_scales", "b_zeros_or_none", "g_idx_or_none", "perm_or_none")),
    "is_full_k": True,
    "use_atomic_add": False,
    "use_fp32_reduce": True,
    "is_zp_float": False,
}
"""What `_fused_marlin_moe` passes for weights without zero points and activations of 16 bits."""


def version() -> str:
    """Returns the version of the installed vLLM; `not installed` without one."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed" if library() is None else "unknown"


def library() -> Path | None:
    """Returns the path of the library in the installed vLLM; None if there is none."""
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    paths = (Path(folder) / name for folder in folders for name in LIBRARIES)
    return next((path for path in paths if path.is_file()), None)


def load() -> tuple[str, str] | None:
    """Loads the library, if the op is not there yet. Returns why the op cannot be called and a hint; else None."""
    import torch

    if not _is_loaded():
        path = library()
        if path is None:
            return "vLLM's library of MoE kernels is not installed", "pip install vllm"
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError as error:
            return f"{path} does not load: {error}", "Install the vLLM that was built for this torch."
    if not _is_loaded():
        return f"the library of vLLM {version()} has no {GEMM}", "Install vLLM 0.26.0 or later."
    names = set(argument_names())
    if unknown := (names - KNOWN) | (NEEDED - names):
        return (
            f"{GEMM} of vLLM {version()} differs from the known one in {', '.join(sorted(unknown))}",
            "Install vLLM 0.26.0 … 0.33.0.",
        )
    return None


def _is_loaded() -> bool:
    import torch

    return hasattr(getattr(torch.ops, NAMESPACE), GEMM)


def argument_names() -> tuple[str, ...]:
    """Returns the names of the op's arguments, in their order."""
    import torch

    schema = getattr(getattr(torch.ops, NAMESPACE), GEMM).default._schema
    return tuple(argument.name for argument in schema.arguments)


def ordered(names: tuple[str, ...], given: Mapping[str, Any]) -> list[Any]:
    """Returns the positional arguments of the op.

    Args:
        names: the op's own, as `argument_names` returns them.
        given: the values that differ from call to call.
    """
    values = {**_FIXED, **given}
    return [values[name] for name in names]
