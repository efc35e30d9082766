"""The versions of FlashInfer that moetune knows, and the installed one."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import Final

PACKAGE: Final = "flashinfer-python"


@dataclass(frozen=True, slots=True)
class Version:
    """One release of flashinfer-python, and what its tuner's cache files hold.

    `cutlass_ranks`: the cutlass key holds the ranks. `trtllm_extras`: the trtllm key holds the layer. `flat_scales`:
    activation scales may be one-dimensional. `policies`: an entry may say how it was measured.
    """

    name: str
    cutlass_ranks: bool
    trtllm_extras: bool
    flat_scales: bool
    policies: bool


VERSIONS: Final = {
    version.name: version
    for version in (
        Version("0.6.18", cutlass_ranks=True, trtllm_extras=False, flat_scales=False, policies=False),
        Version("0.6.18.post1", cutlass_ranks=True, trtllm_extras=False, flat_scales=False, policies=False),
        Version("0.7.0", cutlass_ranks=True, trtllm_extras=True, flat_scales=True, policies=False),
        Version("0.7.0.post1", cutlass_ranks=True, trtllm_extras=True, flat_scales=True, policies=False),
        Version("0.7.1", cutlass_ranks=True, trtllm_extras=True, flat_scales=True, policies=True),
        Version("0.7.2", cutlass_ranks=False, trtllm_extras=True, flat_scales=True, policies=True),
        Version("0.7.2.post1", cutlass_ranks=False, trtllm_extras=True, flat_scales=True, policies=True),
    )
}
"""The versions whose `autotuner` was read, by name, the oldest first.

Older ones are not supported. Their tuner's key of an MoE call has no fields of the layer (`get_cache_key_extras`), and
except for fp4 the call does not say how its routing is given (`routing_input_mode`); 0.6.8 … 0.6.17 were read.
"""


def version() -> str | None:
    """Returns the version of the installed FlashInfer, or None if it is not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def obstacle() -> str | None:
    """Returns why moetune leaves the installed FlashInfer's tuner alone, or None if it does not."""
    installed = version()
    if installed is None:
        return f"{PACKAGE} is not installed."
    if installed.partition("+")[0] in VERSIONS:
        return None
    if _numbers(installed) < _numbers(next(iter(VERSIONS))):
        return (
            f"{PACKAGE} {installed} is too old, so it tunes its MoE ops in its own way; Triton experts do not need it. "
            f"Install one of {', '.join(VERSIONS)} (vLLM 0.29 and later pin one)."
        )
    return (
        f"moetune does not know the tuner of {PACKAGE} {installed} (it knows {', '.join(VERSIONS)}). "
        "FlashInfer tunes its ops in its own way, without regard to the regime."
    )


def _numbers(release: str) -> tuple[int, ...]:
    """Returns the first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])
