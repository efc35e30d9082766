"""Writes vLLM's fused-MoE configuration file for its batched Triton kernel.

vLLM looks both Triton kernels up in one file: `BatchedTritonExperts.apply` calls `try_get_optimal_moe_config` with the
capacity of its buffer as M, and takes the three block sizes. Read in `fused_batched_moe.py` of vLLM 0.26.0 and 0.33.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moetune.backends.batched_triton.space import FIXED, VALUES
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.kernel_versions import numbers, parse_version
from moetune.backends.grouped_triton.space import VALUES as GROUPED
from moetune.errors import UnsupportedError
from moetune.export.base import FOLDER, Export, as_json
from moetune.inputs.engine_flags import engine_flags, preferred_to_triton
from moetune.inputs.launch_table import FOLDER_VARIABLES
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile

BACKEND: Final = "batched-triton"
READ: Final = ("0.26", "0.33")
"""The oldest and the newest version of vLLM whose batched kernel was read."""


def export(profile: Profile, version: str | None) -> Export:
    """Returns the configuration file of a batched profile, or two if ranks have different numbers of experts.

    Args:
        profile: a profile of the backend batched-triton.
        version: vLLM's version. [default: the newest known]

    Raises:
        UsageError: `version` is no version.
        UnsupportedError: the profile was not measured on a GPU, or has other tunables.
    """
    layer, regime, strict = profile.layer, profile.regime, profile.environment.strict
    missing = [name for name in ("compute_capability", "triton") if not numbers(strict.get(name, ""))]
    if missing:
        raise UnsupportedError(
            f"The profile was measured on {profile.environment.device} and does not say {', '.join(missing)}.",
            "Tune on the GPU that will serve.",
        )
    configs = {str(choice.rows): _config(choice.tactic) for choice in profile.choices}
    text = as_json({"triton_version": strict["triton"], **configs})
    experts = {regime.shard(layer, rank).num_local: None for rank in (0, regime.ep_size - 1)}
    device, flag = profile.environment.device, engine_flags(BACKEND, layer.precision)["vllm"]
    variable = FOLDER_VARIABLES["vllm"]
    return Export(
        files={ConfigFile.of(layer, regime, device, count).vllm_name: text for count in experts},
        usage=(
            f"Start vLLM with `{flag}` and `{variable}={FOLDER}`. vLLM looks its batched and its grouped Triton kernel "
            "up in a file of one name. So keep this folder apart from the files of the grouped kernel, and use it for "
            "its own deployment only: a file that was tuned for one kernel is not tuned for the other. The file's row "
            "count is the capacity of the expert-major buffer: the most tokens of a rank in one step "
            "(`--max-num-batched-tokens`) times the ranks. vLLM looks it up by that in every step, whatever its size. "
            "`moetune lookup` says before the start whether it will find the file; its log then says `Using "
            "configuration from …`."
        ),
        variables={variable: FOLDER},
        warnings=tuple(_warnings(profile, version)),
        notes=tuple(_notes(profile, len(experts))),
    )


def _config(tactic: Tactic) -> dict[str, int]:
    """Returns the three block sizes, and for the grouped kernel's other tunables what the batched one runs with.

    The batched kernel does not read these. The grouped one would fail without them.
    """
    if set(tactic) != set(VALUES) or not all(type(value) is int and value > 0 for value in tactic.values()):
        raise UnsupportedError(
            f"vLLM's batched kernel has the tunables {', '.join(VALUES)}, positive integers; the profile has {tactic}.",
            f"Tune with --backend {BACKEND}.",
        )
    whole = {**FIXED, **tactic}
    return {name: int(whole[name]) for name in GROUPED}


def _warnings(profile: Profile, version: str | None) -> Iterator[str]:
    layer, regime = profile.layer, profile.regime
    if version is not None:
        width = slice(len(numbers(READ[0])))
        if not numbers(READ[0]) <= parse_version(version)[width] <= numbers(READ[1]):
            yield f"The batched kernel of vLLM {version} was not read: moetune knows that of {' … '.join(READ)}."
    capability = numbers(profile.environment.strict["compute_capability"])[0]
    other = preferred_to_triton("vllm", layer.precision, regime.ep_size, capability, regime.layout)
    if other is not None:
        yield (
            f"For {layer.precision.value} experts in expert-major rows vLLM prefers {other} to Triton, and then does "
            f"not read this file. Start it with {engine_flags(BACKEND, layer.precision)['vllm']}."
        )


def _notes(profile: Profile, num_files: int) -> Iterator[str]:
    regime = profile.regime
    yield (
        f"The file is for a capacity of {regime.capacity:,} rows: {regime.capacity // regime.ep_size:,} tokens of each "
        f"of {regime.ep_size} ranks. With another --max-num-batched-tokens tune again."
    )
    yield (
        "The file has the name of the grouped kernel's file. Its folder is its own, so that neither kernel reads what "
        "was tuned for the other."
    )
    yield "Leave VLLM_TRITON_USE_TD unset: the tactics were measured with operands that are read through pointers."
    if num_files > 1:
        yield "Shards are uneven: what was measured on one number of experts is written for both."
