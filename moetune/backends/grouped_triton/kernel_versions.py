"""Says what the grouped Triton GEMM of each version of vLLM and SGLang does, as read in their sources.

Read were the wheels of vLLM 0.19.1 to 0.33.0, every minor version, and of SGLang 0.5.10 and 0.5.23. A row holds from
its version on, until the next row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from moetune.errors import UsageError
from moetune.quoting import quoted

Remote = Literal["drop", "zero"]
"""How non-local slots are treated: no block is launched for them, or blocks that write zeros."""


@dataclass(frozen=True, slots=True)
class KernelVersion:
    """What one engine's kernel does, and the code that launches it, from one version on.

    Args:
        since: the first version that does so, such as `0.25`.
        swaps_operands: in fp8 on Hopper it computes the transposed tile if BLOCK_SIZE_M < 64 ≤ BLOCK_SIZE_N.
        narrow_default: up to 8 rows, the default tile in fp8 with block scales has 64 columns, not 128.
        remote: how non-local slots are treated.
        descriptors: `VLLM_TRITON_USE_TD=1` makes bf16 read its operands through tensor descriptors. CUDA's default
            reads them through pointers.
        clamps_k: in fp8 with block scales, BLOCK_SIZE_K is limited to the scale block.
        source: where that was read.
    """

    since: str
    swaps_operands: bool
    narrow_default: bool
    remote: Remote
    descriptors: bool
    clamps_k: bool
    source: str

    def runs_like(self, other: KernelVersion) -> bool:
        """Returns whether both have the same kernel and the same default. How they treat non-local slots may differ."""
        return (self.swaps_operands, self.narrow_default) == (other.swaps_operands, other.narrow_default)


VLLM: Final = (
    KernelVersion(
        "0.19",
        swaps_operands=False,
        narrow_default=False,
        remote="zero",
        descriptors=False,
        clamps_k=True,
        source="`fused_moe.py` of 0.19.1 … 0.24.0: `fused_moe_kernel`, `get_default_config`, `TritonExperts.apply`",
    ),
    KernelVersion(
        "0.25",
        swaps_operands=True,
        narrow_default=True,
        remote="zero",
        descriptors=False,
        clamps_k=True,
        source="vllm#36559: `enable_swap_ab` of `utils.py`; `get_default_config` of 0.25.0",
    ),
    KernelVersion(
        "0.27",
        swaps_operands=True,
        narrow_default=True,
        remote="zero",
        descriptors=True,
        clamps_k=True,
        source="`resolve_moe_use_td` of `utils.py` in 0.27.0",
    ),
    KernelVersion(
        "0.31",
        swaps_operands=True,
        narrow_default=True,
        remote="drop",
        descriptors=True,
        clamps_k=True,
        source="vllm#58051: `skip_invalid` in `TritonExperts.apply` of 0.31.0 … 0.33.0",
    ),
)
SGLANG: Final = (
    KernelVersion(
        "0.5.10",
        swaps_operands=True,
        narrow_default=False,
        remote="zero",
        descriptors=False,
        clamps_k=False,
        source="sglang#15712: `should_enable_swap_ab` of `fused_moe_triton_kernels.py` in 0.5.10 and 0.5.23",
    ),
)
NEWEST: Final = VLLM[-1]
NEWEST_READ: Final[Mapping[str, str]] = {"vllm": "0.33.0", "sglang": "0.5.23"}
"""The newest version of each engine that was read."""
MOST_DIGITS: Final = 18
"""Number of digits that are read of each part of a version."""
_ROWS: Final[Mapping[str, tuple[KernelVersion, ...]]] = {"vllm": VLLM, "sglang": SGLANG}


def kernel_version(engine: str, version: str) -> KernelVersion:
    """Returns the row of the table for a version of `vllm` or `sglang`; the first or last row for one outside it.

    Raises:
        UsageError: `version` does not start with a number.
    """
    wanted, rows = parse_version(version), _ROWS[engine]
    return next((row for row in reversed(rows) if wanted >= numbers(row.since)), rows[0])


def unread(engine: str, version: str) -> str | None:
    """Returns the range of versions that were read if `version` is outside it, such as `0.19 … 0.33`; else None.

    Raises:
        UsageError: `version` does not start with a number.
    """
    oldest, newest = _ROWS[engine][0].since, NEWEST_READ[engine]
    width = len(numbers(oldest))
    wanted = parse_version(version)[:width]
    if numbers(oldest) <= wanted <= numbers(newest)[:width]:
        return None
    return f"{oldest} … {'.'.join(map(str, numbers(newest)[:width]))}"


def known_version(engine: str, version: str) -> str:
    """Returns the version if it was read; else the first version of its row of the table.

    Raises:
        UsageError: `version` does not start with a number.
    """
    return version if unread(engine, version) is None else kernel_version(engine, version).since


def versions_like(row: KernelVersion) -> str:
    """Returns the versions of vLLM that have the kernel and the default of `row`: `before 0.25` or `from 0.25 on`."""
    alike = [other for other in VLLM if other.runs_like(row)]
    later = VLLM[VLLM.index(alike[-1]) + 1 :]
    return f"before {later[0].since}" if later else f"from {alike[0].since} on"


def stored_name(row: KernelVersion) -> str | None:
    """Returns how an environment names the kernel of `row`: the first version that has it; None for the newest."""
    if row.runs_like(NEWEST):
        return None
    return next(other.since for other in VLLM if other.runs_like(row))


def parse_version(version: str) -> tuple[int, ...]:
    """Returns a version as numbers: `0.20.2` → (0, 20, 2).

    Raises:
        UsageError: `version` does not start with a number.
    """
    if not (found := numbers(version)):
        raise UsageError(f"Not a version: {quoted(version)}.", "Write it like 0.20.2.")
    return found


def numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: `3.6.0+git12ab` → (3, 6, 0)."""
    found: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits[:MOST_DIGITS]))
        if digits != part:
            break
    return tuple(found)
