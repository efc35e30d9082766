"""Says for which engine the tactics of a profile were measured, and why another engine would run another load."""

from __future__ import annotations

from typing import Final

from moetune.errors import MoetuneError
from moetune.export.kernel_check import require_same_kernel, target_version
from moetune.export.triton import TritonProfile
from moetune.spec.enums import ENGINE_TITLES
from moetune.store.profile import Profile

TRITON_ENGINES: Final = ("vllm", "sglang")
"""The engines that read tactics of the Triton kernel."""
_ENGINES: Final = {
    "batched-triton": "vllm",
    "flashinfer-cutlass": "flashinfer",
    "flashinfer-trtllm": "trtllm",
    "flashinfer-trtllm-routed": "trtllm",
}


def unfit(profile: Profile, engine: str) -> tuple[str, ...]:
    """Returns why the newest known version of `engine` would not run what was measured; empty if it would.

    Args:
        profile: a profile of the backend triton.
        engine: `vllm` or `sglang`.
    """
    target = target_version(engine, None)
    try:
        measured = TritonProfile.of(profile, engine, target)
        require_same_kernel(measured, engine, None)
    except MoetuneError as error:
        return (str(error),)
    return tuple(measured.warnings(engine, target.remote))


def export_words(profile: Profile, wanted: str | None = None) -> list[str]:
    """Returns the options of `moetune export` for the engine that the profile is for; empty if no engine reads it.

    Args:
        profile: the profile.
        wanted: the engine to take if the profile is for more than one.
    """
    if profile.backend != "triton":
        engine = _ENGINES.get(profile.backend)
        return ["--to", engine] if engine else []
    strict = profile.environment.strict
    if "kernel_version" in strict:
        return ["--to", "vllm", "--for-version", strict["kernel_version"]]
    likely = "sglang" if strict.get("remote") == "zero" else "vllm"
    order = sorted(TRITON_ENGINES, key=lambda engine: (engine != wanted, engine != likely))
    return ["--to", next((engine for engine in order if not unfit(profile, engine)), likely)]


def fitting_line(profile: Profile, wanted: str | None = None) -> str:
    """Returns why engines would not run what was measured, as one line; empty if they would, or if no GPU was measured.

    Args:
        profile: the profile.
        wanted: the engine to check; by default all that read Triton tactics.
    """
    on_gpu = "compute_capability" in profile.environment.strict
    if profile.backend != "triton" or not on_gpu or wanted not in (None, *TRITON_ENGINES):
        return ""
    checked = TRITON_ENGINES if wanted is None else (wanted,)
    reasons = {engine: unfit(profile, engine) for engine in checked}
    return " ".join(f"not for {ENGINE_TITLES[engine]}: {found[0]}" for engine, found in reasons.items() if found)
