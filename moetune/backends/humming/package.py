"""Finds the installed package humming-kernels, and lets it generate code on a machine without a GPU.

The package has no stable interface, so moetune knows one version of it. It is imported only when a kernel is needed:
importing it starts a process that looks for a compiler.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

NAME: Final = "humming-kernels"
KNOWN: Final = "0.1.19"
"""The version that vLLM 0.33.0 pins. SGLang 0.5.23 pins 0.1.12, whose kernels and configurations are others."""
_INSTALL: Final = f"pip install 'humming-kernels[cu13]=={KNOWN}'"


def version() -> str:
    """Returns the version of the installed package; `not installed` without one."""
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def missing() -> tuple[str, str] | None:
    """Returns why the installed package cannot be used and a hint; None if it is the known one."""
    if importlib.util.find_spec("humming") is None:
        return f"{NAME} is not installed", _INSTALL
    if version() != KNOWN:
        return f"{NAME} {version()} is installed, and moetune knows {KNOWN}, which vLLM 0.33.0 pins", _INSTALL
    return None


def without_compiler() -> tuple[str, str] | None:
    """Returns why Humming finds no compiler and a hint; None if it finds one. It imports Humming."""
    try:
        from humming.jit.runtime import KernelRuntime

        KernelRuntime._get_compiler().signature()
    except Exception as error:  # NVRTC, its headers or the driver's library are missing: each raises another one
        return f"{NAME} finds no compiler: {error}", _INSTALL
    return None


@contextmanager
def without_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Lets Humming generate and compile code for a GPU that need not be present.

    Humming asks the driver for the properties of the current device. Of these, code of a given configuration depends on
    the compute capability and the registers alone.
    """
    from humming import device

    current = device.current_device
    before = current._value
    current._value = SimpleNamespace(
        index=0,
        is_ppu=False,
        sm_version=capability[0] * 10 + capability[1],
        sm_major=capability[0],
        sm_minor=capability[1],
        max_registers_per_sm=65_536,
    )
    try:
        yield
    finally:
        current._value = before


def compile_kernel(fields: dict[str, Any], capability: tuple[int, int]) -> str:
    """Compiles one kernel into Humming's cache, where its launch finds it. Needs no GPU.

    Args:
        fields: those of `LayerConfig`, `ComputeConfig` and `TuningConfig` together.
        capability: the compute capability of the GPU.

    Returns:
        The path of the cubin.

    Raises:
        AssertionError, ValueError, RuntimeError: the fields fit no kernel, or the compiler refuses its code.
    """
    from humming.kernel.humming import HummingKernel

    class Unregistered(HummingKernel):  # type: ignore[misc]
        """A kernel that is not handed to the launcher, whose library needs a driver."""

        def register_kernel(self) -> None:
            pass

    with without_gpu(capability):
        return str(Unregistered(**fields).kernel_filename)
