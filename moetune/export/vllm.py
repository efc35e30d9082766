"""Writes vLLM's fused-MoE configuration file, which it finds through `VLLM_TUNED_CONFIG_FOLDER`.

Format: `get_moe_configs` of vLLM's `fused_moe.py`. `engine_files` names it, and `engine_flags` knows which kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from moetune.export.base import FOLDER, Export, as_json
from moetune.export.triton import TritonProfile, parse_version
from moetune.inputs.engine_flags import preferred_to_triton
from moetune.store.profile import Profile

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
NEWEST = (0, 33)
_DROPS_REMOTE_SINCE = (0, 20)


def export(profile: Profile, version: str | None = None, /) -> Export:
    """Returns the configuration file of a Triton profile, or two if ranks have different numbers of experts.

    Args:
        profile: a profile of the backend triton.
        version: vLLM's version. Before 0.20 it did not skip non-local slots.

    Raises:
        UsageError: `version` is no version.
        UnsupportedError: vLLM's Triton kernel cannot use this profile.
    """
    measured = TritonProfile.of(profile, "vllm")
    remote = "drop" if parse_version(version, NEWEST) >= _DROPS_REMOTE_SINCE else "zero"
    text = as_json({"triton_version": measured.triton, **{str(rows): c for rows, c in measured.configs.items()}})
    return Export(
        files={measured.file(num_experts).vllm_name: text for num_experts in measured.num_experts},
        usage=(
            f"Start vLLM with `{FOLDER_VARIABLE}={FOLDER}`. It looks here before its own files, and its log then says "
            "`Using configuration from …`. Use this folder for its own deployment only: k, H, ep and the dispatch are "
            "not in a file's name."
        ),
        variables={FOLDER_VARIABLE: FOLDER},
        warnings=(*measured.warnings("vllm", remote), *_other_kernels(measured)),
        notes=tuple(measured.notes("vllm")),
    )


def _other_kernels(measured: TritonProfile) -> Iterator[str]:
    """Yields a warning if vLLM prefers another kernel to Triton."""
    layer, regime = measured.profile.layer, measured.profile.regime
    first = preferred_to_triton("vllm", layer.precision, regime.ep_size, measured.capability[0])
    if first is None:
        return
    yield (
        f"For {layer.precision.value} experts at EP {regime.ep_size} on this device vLLM prefers {first} to Triton, "
        "and then does not read this file. Start it with --moe-backend triton."
    )
