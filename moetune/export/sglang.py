"""Writes SGLang's fused-MoE configuration files, which it finds through `SGLANG_MOE_CONFIG_DIR`.

Format: `get_config_file_name` and `get_moe_configs` of SGLang's `fused_moe_triton_config.py` (0.5.10 … 0.5.23). It
differs from vLLM's: the folder is named by Triton's version, the file's name has a blank in the scale block and the
device's full name, and every key of the file is a number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from moetune.backends.grouped_triton.engine_files import release, sglang_folder
from moetune.export.base import FOLDER, Export, as_json
from moetune.export.kernel_check import kernel_warnings, require_same_kernel, target_version
from moetune.export.triton import TritonProfile
from moetune.store.profile import Profile

FOLDER_VARIABLE = "SGLANG_MOE_CONFIG_DIR"
_OLD_FALLBACKS = ("3.4.0", "3.3.1", "3.2.0", "3.1.0")


def export(profile: Profile, version: str | None = None, /) -> Export:
    """Returns the configuration file of a Triton profile, and a second one if SGLang may fuse the shared expert.

    Args:
        profile: a profile of the backend triton.
        version: SGLang's version. All known versions have the same format.

    Raises:
        UsageError: `version` is no version, or its kernel runs these tactics in another way.
        UnsupportedError: SGLang's Triton kernel cannot use this profile.
    """
    target = target_version("sglang", version)
    measured = TritonProfile.of(profile, "sglang", target)
    require_same_kernel(measured, "sglang", version)
    text = as_json({str(rows): config for rows, config in measured.configs.items()})
    folder = f"configs/{sglang_folder(release(measured.triton))}"
    experts = [*measured.num_experts, *_with_fused_shared(measured)]
    return Export(
        files={f"{folder}/{measured.file(num_experts).sglang_name()}": text for num_experts in experts},
        usage=(
            f"Start SGLang with `--moe-runner-backend triton` and `{FOLDER_VARIABLE}={FOLDER}` (it has `configs`). "
            "`moetune lookup` says before the start whether it will find the file. The GPU is in a file's name, "
            "and the Triton that it was measured with in its folder's. SGLang then ignores its own files: if the "
            "model has layers of other shapes, copy their files here too. Ignore it if the log misses a "
            "`_down.json`: both GEMMs were measured with one configuration. Use this folder for its own "
            "deployment only: k, H, ep and the dispatch are not in a file's name."
        ),
        variables={FOLDER_VARIABLE: FOLDER},
        warnings=(
            *measured.warnings("sglang", target.remote),
            *kernel_warnings(measured, "sglang", version),
            *_warnings(measured),
        ),
        notes=(*measured.notes("sglang"), *_notes(measured)),
    )


def _with_fused_shared(measured: TritonProfile) -> tuple[int, ...]:
    """Returns E with the shared experts counted, or nothing. On CUDA SGLang fuses them only at EP 1."""
    shared = measured.profile.layer.num_shared_experts
    return (measured.num_experts[0] + shared,) if shared and measured.profile.regime.ep_size == 1 else ()


def _warnings(measured: TritonProfile) -> Iterator[str]:
    layer = measured.profile.layer
    for fused in _with_fused_shared(measured):
        shared = fused - measured.num_experts[0]
        yield (
            f"If SGLang fuses the shared expert (DeepSeek-V3 and R1, GLM-4.5 …) it reads the file of E = {fused}, "
            f"and a row has {layer.top_k + shared} slots; the tactics in it were measured with {layer.top_k}. "
            "Start it with --disable-shared-experts-fusion to get the load that was measured."
        )
    if measured.capability[0] == 10:
        yield (
            "On this device SGLang prefers flashinfer_trtllm to Triton for many models, and then does not read this "
            "file. Start it with --moe-runner-backend triton."
        )


def _notes(measured: TritonProfile) -> Iterator[str]:
    yield "SGLang runs the Triton kernel only with --moe-a2a-backend none (its default)."
    if release(measured.triton) != measured.triton:
        yield (
            f"Triton {measured.triton} is filed under {release(measured.triton)}: SGLang 0.5.23 reads only numbers "
            "in a folder's version, and falls back to this folder."
        )
    elif measured.triton not in _OLD_FALLBACKS:
        yield (
            f"SGLang 0.5.10 finds the file only while it runs Triton {measured.triton}; "
            "SGLang 0.5.23 falls back to it under any other Triton."
        )
