"""Knows what FlashInfer's `cutlass_fused_moe` takes, and whether its compiled module can be loaded at once."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moetune.backends.device import without_device
from moetune.backends.flashinfer_cutlass.formats import Format
from moetune.errors import UnsupportedError
from moetune.inputs import flashinfer_versions
from moetune.spec.layer import Activation, MoELayer

ACTIVATIONS = {
    Activation.SILU: "Swiglu",
    Activation.GELU: "GegluTanh",
    Activation.SWIGLU_CLAMPED: "Swiglu",
    Activation.SILU_CLAMPED: "Swiglu",
}
"""The names in FlashInfer's `ActivationType`. The op clamps a Swiglu that has constants (`swiglu_limit` …)."""
MODULES = {(9, 0): "90", (10, 0): "100", (10, 3): "103", (10, 7): "100", (11, 0): "100", (12, 0): "120", (12, 1): "120"}
"""The module of each compute capability, as in FlashInfer's `get_cutlass_fused_moe_module`."""
BUILD = 'python -c "from flashinfer.fused_moe.core import get_cutlass_fused_moe_module as build; build({!r})"'
TOOLKIT = "/usr/local/cuda"
"""Where FlashInfer looks for nvcc if no environment variable names it."""


def lacking(
    argument: str, meaning: str, capabilities: Collection[tuple[int, int]] = tuple(MODULES)
) -> tuple[str, str] | None:
    """Returns why the op cannot run here, and a hint: FlashInfer, a suitable GPU, an argument or the module is missing.

    Args:
        argument: the argument of the op without which it is of no use, and
        meaning: what this argument does.
        capabilities: the compute capabilities on which the wanted kernels run.
    """
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed", "pip install flashinfer-python"
    known = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    needs = f"needs compute capability {known}"
    if obstacle := without_device(capabilities.__contains__, needs, "Use --backend triton."):
        return obstacle
    import torch
    from flashinfer.fused_moe import cutlass_fused_moe

    if argument not in inspect.signature(cutlass_fused_moe).parameters:
        return f"FlashInfer {version()} has no {argument}, {meaning}", "pip install --upgrade flashinfer-python"
    return unbuilt(MODULES[torch.cuda.get_device_capability()])


def unbuilt(module: str) -> tuple[str, str] | None:
    """Returns why the op's module for an architecture (`"90"` …) cannot be loaded at once, and a hint; else None.

    FlashInfer takes the module from its own wheel, from `flashinfer-jit-cache`, or from a cache that it fills at the
    first call. Filling it compiles 248 files for Hopper, about 25 minutes on 64 cores. Tuning must not start that.
    """
    from flashinfer.jit import env

    name = f"fused_moe_{module}"
    places = [env.FLASHINFER_AOT_DIR / name, *env.FLASHINFER_JIT_DIR.glob(f"{name}*")]
    if hasattr(env, "get_aot_path"):
        places.append(env.get_aot_path(name).parent)
    if any((place / f"{place.name}.so").is_file() for place in places):
        return None
    install = f"pip install flashinfer-jit-cache=={version()} (from FlashInfer's own index)"
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        return (
            f"{name} is not prebuilt, and FLASHINFER_DISABLE_JIT forbids building it",
            f"{install}, or unset FLASHINFER_DISABLE_JIT.",
        )
    if not _nvcc():
        return f"{name} is not prebuilt, and nvcc is missing to build it", f"{install}, or install a CUDA toolkit."
    return (
        f"{name} is not built yet; FlashInfer takes about half an hour to build it",
        f"{install}, or {BUILD.format(module)}",
    )


def _nvcc() -> bool:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT)
    named: list[Any] = [os.environ.get("FLASHINFER_NVCC"), *(Path(home, "bin/nvcc") for home in homes if home)]
    return shutil.which("nvcc") is not None or any(path and Path(path).is_file() for path in named)


def version() -> str:
    """Returns the version of the installed FlashInfer, or `not installed`."""
    return flashinfer_versions.version() or "not installed"


def activation_type(layer: MoELayer) -> Any:
    """Returns FlashInfer's `ActivationType` of a layer."""
    return getattr(importlib.import_module("flashinfer.fused_moe").ActivationType, ACTIVATIONS[layer.activation])


def require_flags(parameters: Collection[str], fmt: Format) -> None:
    """Checks that a function of FlashInfer has the parameters that select a format's kernels.

    Raises:
        UnsupportedError: one is missing, so that other kernels would run.
    """
    if missing := [name for name in fmt.flags if name not in parameters]:
        raise UnsupportedError(
            f"FlashInfer {version()} has no {missing[0]} in cutlass_fused_moe, which selects these kernels.",
            "pip install --upgrade flashinfer-python",
        )
