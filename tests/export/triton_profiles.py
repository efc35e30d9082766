"""Profiles of the Triton backend as `tune` stores them, and readers written from the engines' documented look-up."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from choices import make_choice

from moetune.inputs import presets
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile

STRICT = {
    "compute_capability": "9.0",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "triton": "3.6.0",
    "kernel": "builtin",
    "kernel_source": "0123456789abcdef",
    "remote": "drop",
}
NAMES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")


def tactic(*values: int) -> Tactic:
    return Tactic(dict(zip(NAMES, values, strict=True)))


def choice(rows: int, chosen: Tactic) -> Choice:
    return make_choice(
        rows,
        tactic=chosen,
        default_tactic=tactic(16, 64, 128, 1, 4, 4),
        measured_at="2026-11-20T12:00:00Z",
        rejected=(),
    )


def profile(
    layer: MoELayer | str = "deepseek-r1",
    tactics: Mapping[int, Tactic] | None = None,
    *,
    device: str = "NVIDIA H200",
    strict: Mapping[str, str] | None = None,
    backend: str = "triton",
    **regime: Any,
) -> Profile:
    """Of `deepseek-r1` under all-gather at EP 8 where nothing else is given; one tactic a bucket."""
    regime = regime or {"ep_size": 8, "dispatch": "allgather"}
    asked = Regime(**{"ladder": "vllm", "tune_max_num_tokens": 8, **regime})
    given = {rows: tactic(16, 32 * (1 + index % 8), 128, 1, 4, 3) for index, rows in enumerate(asked.buckets)}
    return Profile(
        layer=presets.layer(layer) if isinstance(layer, str) else layer,
        regime=asked,
        backend=backend,
        environment=Environment(device=device, strict=STRICT if strict is None else dict(strict)),
        choices=tuple(choice(rows, chosen) for rows, chosen in (tactics or given).items()),
    )


def vllm_reads(
    files: Mapping[str, str], device: str, experts: int, n: int, dtype: str = "", block: str = ""
) -> dict[int, dict[str, int]] | None:
    """What vLLM holds after reading its tuned folder, None where it finds no file: the name without blanks, the H200
    family under one name, the version of Triton taken out, every other key an int."""
    device = "NVIDIA_H200" if "H200" in re.split(r"[\s/]+", device) else re.sub(r"[\s/]+", "_", device)
    name = f"E={experts},N={n},device_name={device}" + (f",dtype={dtype}" if dtype else "")
    name += f",block_shape=[{block}]" if block else ""
    if f"{name}.json" not in files:
        return None
    held = json.loads(files[f"{name}.json"])
    held.pop("triton_version", None)
    return {int(key): value for key, value in held.items()}


def sglang_reads(
    files: Mapping[str, str], triton: str, device: str, experts: int, n: int, dtype: str = "", block: str = ""
) -> dict[int, dict[str, int]] | None:
    """What SGLang 0.5.23 holds: from the folder of the running Triton, else from the newest; every key an int."""
    suffix = (f",dtype={dtype}" if dtype else "") + (f",block_shape=[{block}]" if block else "")
    name = f"E={experts},N={n},device_name={device.replace(' ', '_')}{suffix}.json"
    folders = {path.split("/")[1] for path in files if path.startswith("configs/triton_")}
    newest_first = sorted(folders, key=lambda folder: [int(part) for part in folder.split("_")[1:]], reverse=True)
    for folder in (f"triton_{triton.replace('.', '_')}", *newest_first):
        if (path := f"configs/{folder}/{name}") in files:
            return {int(key): value for key, value in json.loads(files[path]).items()}
    return None


def looked_up(configs: Mapping[int, dict[str, int]], rows: int) -> dict[str, int]:
    """The nearest key's configuration, the first of two: the rule of both engines."""
    return configs[min(configs, key=lambda key: abs(key - rows))]
