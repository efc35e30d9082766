"""Compares the kernel that a profile was measured with and the one of the engine's version that will read the file."""

from __future__ import annotations

from collections.abc import Iterator

from moetune.backends.grouped_triton.kernel_versions import (
    NEWEST,
    NEWEST_READ,
    KernelVersion,
    kernel_version,
    known_version,
    unread,
    versions_like,
)
from moetune.backends.grouped_triton.space import swaps_operands
from moetune.errors import UsageError
from moetune.export.triton import FP8, TritonProfile
from moetune.spec.enums import ENGINE_TITLES, Precision

_DOES = {True: "swaps", False: "does not swap"}


def require_same_kernel(measured: TritonProfile, engine: str, version: str | None) -> None:
    """Checks that a version of an engine computes the profile's tactics as they were measured.

    In fp8 on Hopper, versions differ in whether they swap the operands of a tile with BLOCK_SIZE_M < 64 ≤ BLOCK_SIZE_N.

    Raises:
        UsageError: a tactic runs in another way, or `version` is no version.
    """
    target = target_version(engine, version)
    if not (rows := _swapped(measured, target)):
        return
    name = f"{ENGINE_TITLES[engine]} {version or NEWEST_READ[engine]}"
    raise UsageError(
        f"In fp8 on Hopper {name} {_DOES[target.swaps_operands]} the operands of the tactics of {_listed(rows)} rows. "
        f"They were measured with the kernel of vLLM {versions_like(measured.version)}, "
        f"which {_DOES[measured.version.swaps_operands]} them.",
        _tune_again(engine, version, target),
    )


def kernel_warnings(measured: TritonProfile, engine: str, version: str | None) -> Iterator[str]:
    """Yields a warning if the version was not read, or if it would have measured other tactics in another way."""
    if version is not None and (known := unread(engine, version)) is not None:
        yield (
            f"The kernel of {ENGINE_TITLES[engine]} {version} was not compared with the measured one: moetune knows "
            f"{known}."
        )
    target = target_version(engine, version)
    fp8_on_hopper = measured.profile.layer.precision in FP8 and measured.capability[0] == 9
    if fp8_on_hopper and target.swaps_operands != measured.version.swaps_operands:
        yield (
            f"These tactics run as they were measured, but others do not. They were chosen among all as vLLM "
            f"{versions_like(measured.version)} runs them. {_tune_again(engine, version, target)}"
        )


def kernel_notes(measured: TritonProfile, engine: str, version: str | None) -> Iterator[str]:
    """Yields a sentence for each difference between the kernels that changes no tactic of the file."""
    target, precision = target_version(engine, version), measured.profile.layer.precision
    differs = target.narrow_default != measured.version.narrow_default
    if engine == "vllm" and differs and precision is Precision.FP8_BLOCK:
        yield (
            f"Up to 8 rows the gains are over the default of vLLM {versions_like(measured.version)}, "
            "and this version has another one."
        )
    if target.descriptors and precision not in FP8:
        yield "Leave VLLM_TRITON_USE_TD unset: the tactics were measured with operands that are read through pointers."


def target_version(engine: str, version: str | None) -> KernelVersion:
    """Returns the row of the table for a version of an engine, by default for the newest that was read.

    Raises:
        UsageError: `version` is no version.
    """
    return kernel_version(engine, NEWEST_READ[engine] if version is None else version)


def _swapped(measured: TritonProfile, target: KernelVersion) -> list[int]:
    """Returns the rows whose tactic the two kernels compute in different ways."""
    fp8, capability = measured.profile.layer.precision in FP8, measured.capability
    return [
        rows
        for rows, config in measured.configs.items()
        if swaps_operands(config, fp8, capability, measured.version) != swaps_operands(config, fp8, capability, target)
    ]


def _tune_again(engine: str, version: str | None, target: KernelVersion) -> str:
    if version is None or target.swaps_operands == NEWEST.swaps_operands:
        return "Run `moetune tune` without kernel_version."
    return f"Run `moetune tune --backend-option kernel_version={known_version(engine, version)}`."


def _listed(rows: list[int]) -> str:
    most = 6
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} other" if len(rows) > most else "")
