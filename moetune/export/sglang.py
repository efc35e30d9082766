"""Profiles as SGLang's fused-MoE configurations, found through `SGLANG_MOE_CONFIG_DIR`.

Format: `get_config_file_name` and `get_moe_configs` of SGLang's `fused_moe_triton_config.py` (0.5.10 … 0.5.23). Unlike
vLLM's, a file lies in a folder of Triton's version, its name has a blank in the scale block and the device's full name,
and its every key is a number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from moetune.export.base import FOLDER, Export, as_json
from moetune.export.triton import TritonProfile, parse_version, release
from moetune.store.profile import Profile

FOLDER_VARIABLE = "SGLANG_MOE_CONFIG_DIR"
NEWEST = (0, 5, 23)
_OLD_FALLBACKS = ("3.4.0", "3.3.1", "3.2.0", "3.1.0")


def export(profile: Profile, version: str | None = None, /) -> Export:
    """The configuration file of a Triton profile; a second one where SGLang may fuse the shared expert.

    Args:
        profile: of the backend triton.
        version: SGLang's. The format is the same in all that are known.

    Raises:
        UsageError: no version.
        UnsupportedError: SGLang's Triton kernel has no use for this profile.
    """
    parse_version(version, NEWEST)
    measured = TritonProfile.of(profile, "sglang")
    text = as_json({str(rows): config for rows, config in measured.configs.items()})
    folder = f"configs/triton_{release(measured.triton).replace('.', '_')}"
    experts = [*measured.num_experts, *_with_fused_shared(measured)]
    return Export(
        files={f"{folder}/{file_name(measured, num_experts)}": text for num_experts in experts},
        usage=(
            f"Start SGLang with `{FOLDER_VARIABLE}={FOLDER}` (the folder that holds `configs`). The variable hides "
            "SGLang's own files: a model with layers of other shapes needs theirs copied here too. No `_down.json` "
            "belongs beside a file, though the log may ask for one: both GEMMs were measured with one configuration. "
            "k, H, ep and the dispatch are not in a file's name, so give each deployment the folder of its own regime."
        ),
        variables={FOLDER_VARIABLE: FOLDER},
        warnings=(*measured.warnings("sglang", "zero"), *_warnings(measured)),
        notes=(*measured.notes("sglang"), *_notes(measured)),
    )


def file_name(measured: TritonProfile, num_experts: int) -> str:
    """The name under which SGLang looks for a file."""
    dtype = f",dtype={measured.dtype}" if measured.dtype else ""
    block = f",block_shape={list(measured.block_shape)}" if measured.block_shape else ""
    device = measured.profile.environment.device.replace(" ", "_")
    return f"E={num_experts},N={measured.intermediate_size},device_name={device}{dtype}{block}.json"


def _with_fused_shared(measured: TritonProfile) -> tuple[int, ...]:
    """E with the shared experts among the routed ones; on CUDA SGLang fuses them only where no rank shares experts."""
    shared = measured.profile.layer.num_shared_experts
    return (measured.num_experts[0] + shared,) if shared and measured.profile.regime.ep_size == 1 else ()


def _warnings(measured: TritonProfile) -> Iterator[str]:
    layer = measured.profile.layer
    for fused in _with_fused_shared(measured):
        shared = fused - measured.num_experts[0]
        yield (
            f"Where SGLang fuses the shared expert (DeepSeek-V3 and R1, GLM-4.5 …) it reads the file of E = {fused}, "
            f"and a row has {layer.top_k + shared} slots; the file holds what was measured with {layer.top_k}. "
            "--disable-shared-experts-fusion brings the load that was measured."
        )
    if measured.capability[0] == 10:
        yield (
            "On this device SGLang prefers flashinfer_trtllm to Triton for many models, and then reads no such file; "
            "start it with --moe-runner-backend triton."
        )


def _notes(measured: TritonProfile) -> Iterator[str]:
    yield "Only --moe-a2a-backend none (the default) reaches the Triton kernel."
    if release(measured.triton) != measured.triton:
        yield (
            f"Triton {measured.triton} is filed under {release(measured.triton)}: SGLang 0.5.23 reads a folder's "
            "version as numbers alone, and falls back to this one."
        )
    elif measured.triton not in _OLD_FALLBACKS:
        yield (
            f"SGLang 0.5.10 finds the file only while it runs Triton {measured.triton}; "
            "0.5.23 falls back to it from any other."
        )
