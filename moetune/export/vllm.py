"""Profiles as vLLM's fused-MoE configurations: one JSON file, found through `VLLM_TUNED_CONFIG_FOLDER`.

Format: `get_config_file_name` and `get_moe_configs` of vLLM's `fused_moe.py`; which kernel runs: `engine_flags`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from moetune.export.base import FOLDER, Export, as_json
from moetune.export.triton import TritonProfile, parse_version
from moetune.inputs.engine_flags import preferred_to_triton
from moetune.store.profile import Profile

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
NEWEST = (0, 33)
_DROPS_REMOTE_SINCE = (0, 20)


def export(profile: Profile, version: str | None = None, /) -> Export:
    """The configuration file of a Triton profile; two where ranks have different numbers of experts.

    Args:
        profile: of the backend triton.
        version: vLLM's; before 0.20 it did not drop slots of other ranks' experts.

    Raises:
        UsageError: no version.
        UnsupportedError: vLLM's Triton kernel has no use for this profile.
    """
    measured = TritonProfile.of(profile, "vllm")
    remote = "drop" if parse_version(version, NEWEST) >= _DROPS_REMOTE_SINCE else "zero"
    text = as_json({"triton_version": measured.triton, **{str(rows): c for rows, c in measured.configs.items()}})
    return Export(
        files={file_name(measured, num_experts): text for num_experts in measured.num_experts},
        usage=(
            f"Start vLLM with `{FOLDER_VARIABLE}={FOLDER}`. It looks here before its own files; its log then says "
            "`Using configuration from …`. k, H, ep and the dispatch are not in a file's name, so give each "
            "deployment the folder of its own regime."
        ),
        variables={FOLDER_VARIABLE: FOLDER},
        warnings=(*measured.warnings("vllm", remote), *_other_kernels(measured)),
        notes=tuple(measured.notes("vllm")),
    )


def file_name(measured: TritonProfile, num_experts: int) -> str:
    """The name under which vLLM looks for a file."""
    dtype = f",dtype={measured.dtype}" if measured.dtype else ""
    block = f",block_shape=[{','.join(map(str, measured.block_shape))}]" if measured.block_shape else ""
    device = device_name(measured.profile.environment.device)
    return f"E={num_experts},N={measured.intermediate_size},device_name={device}{dtype}{block}.json"


def device_name(device: str) -> str:
    """`torch.cuda.get_device_name()` as in a file's name; every H200 is the same one."""
    name = re.sub(r"[\s/]+", "_", device)
    return "NVIDIA_H200" if "H200" in name.split("_") else name


def _other_kernels(measured: TritonProfile) -> Iterator[str]:
    """A warning where vLLM's default order of kernels has another one before Triton."""
    layer, regime = measured.profile.layer, measured.profile.regime
    first = preferred_to_triton("vllm", layer.precision, regime.ep_size, measured.capability[0])
    if first is None:
        return
    yield (
        f"For {layer.precision.value} experts at EP {regime.ep_size} on this device vLLM prefers {first} to Triton, "
        "and then reads no such file; start it with --moe-backend triton."
    )
