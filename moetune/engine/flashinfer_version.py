"""Which FlashInfer is installed, and whether moetune knows its tuner."""

from __future__ import annotations

import importlib.metadata

KNOWN_VERSIONS = ("0.6.18", "0.7.0", "0.7.1", "0.7.2", "0.7.2.post1")
"""Of flashinfer-python: those whose `autotuner` was read."""


def version() -> str | None:
    """The installed FlashInfer's, or None."""
    try:
        return importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def obstacle() -> str | None:
    """Why FlashInfer's tuner is left alone on this machine, or None."""
    installed = version()
    if installed is None:
        return "flashinfer-python is not installed."
    if installed.partition("+")[0] not in KNOWN_VERSIONS:
        return (
            f"flashinfer-python {installed} is not among the versions whose tuner moetune knows "
            f"({', '.join(KNOWN_VERSIONS)}); its ops are tuned as FlashInfer does it, without regard to the regime."
        )
    return None
