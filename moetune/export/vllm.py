"""Writes vLLM's fused-MoE configuration file, which it finds through `VLLM_TUNED_CONFIG_FOLDER`.

Format: `get_moe_configs` of vLLM's `fused_moe.py`. `engine_files` names it, and `engine_flags` knows which kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from moetune.export import batched
from moetune.export.base import FOLDER, Export, as_json
from moetune.export.kernel_check import kernel_notes, kernel_warnings, require_same_kernel, target_version
from moetune.export.triton import TritonProfile
from moetune.inputs.engine_flags import preferred_to_triton
from moetune.store.profile import Profile

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"


def export(profile: Profile, version: str | None = None, /) -> Export:
    """Returns the configuration file of a Triton profile, or two if ranks have different numbers of experts.

    Args:
        profile: a profile of the backend triton or batched-triton. Both kernels read files of one name; `batched`
            writes those of the second.
        version: vLLM's version; see `kernel_versions`. [default: the newest known]

    Raises:
        UsageError: `version` is no version, or its kernel runs these tactics in another way.
        UnsupportedError: vLLM's Triton kernel cannot use this profile.
    """
    if profile.backend == batched.BACKEND:
        return batched.export(profile, version)
    target = target_version("vllm", version)
    measured = TritonProfile.of(profile, "vllm", target)
    require_same_kernel(measured, "vllm", version)
    text = as_json({"triton_version": measured.triton, **{str(rows): c for rows, c in measured.configs.items()}})
    return Export(
        files={measured.file(num_experts).vllm_name: text for num_experts in measured.num_experts},
        usage=(
            f"Start vLLM with `--moe-backend triton` and `{FOLDER_VARIABLE}={FOLDER}`. "
            "Without the flag it runs, for fp8 at EP > 1 and on Blackwell, kernels that read no file. `moetune "
            "lookup` says before the start whether it will find the file. It looks here before its own files, and "
            "its log then says `Using configuration from …`. The GPU is in a file's name; `triton_version` in it "
            "is the Triton that it was measured with. Use this folder for its own deployment only: k, H, ep and "
            "the dispatch are not in a file's name."
        ),
        variables={FOLDER_VARIABLE: FOLDER},
        warnings=(
            *measured.warnings("vllm", target.remote),
            *kernel_warnings(measured, "vllm", version),
            *_other_kernels(measured),
        ),
        notes=(*measured.notes("vllm"), *kernel_notes(measured, "vllm", version)),
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
