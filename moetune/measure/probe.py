"""Describes this machine as an `Environment`."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from moetune._version import __version__
from moetune.backends.base import Backend
from moetune.errors import UnsupportedError, UsageError
from moetune.spec.environment import Environment

SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.current.sm": "sm_clock_mhz",
    "clocks.current.memory": "memory_clock_mhz",
    "clocks.max.sm": "sm_clock_max_mhz",
    "power.limit": "power_limit_w",
}
"""Maps nvidia-smi's fields to the names in `Environment.informative`. moetune never sets the clocks."""


def device_for(requested: str | None) -> str:
    """Returns the torch device to measure on.

    Args:
        requested: `cpu`, `cuda` or `cuda:N`. None selects the GPU if there is one, otherwise the CPU.

    Raises:
        UsageError: `requested` is neither `cpu` nor a CUDA device of this machine.
    """
    import torch

    if requested is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = requested.partition(":")
    present = torch.cuda.device_count() if kind == "cuda" else 0
    if requested == "cpu" or (present and (not index or (index.isdecimal() and int(index) < present))):
        return requested
    raise UsageError(f"This machine has no device {requested!r}.", f"Give one of {', '.join(_devices())}.")


def environment(backend: Backend, device: str) -> Environment:
    """Returns the environment of measurements of `backend` on `device`.

    Args:
        backend: the backend, which adds its own strict fields.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        UnsupportedError: a package that the backend reads its own fields from is missing.
    """
    import torch

    try:
        own = backend.environment()
    except ImportError as error:
        reason, hint = backend.unavailable() or (str(error), "Run `moetune doctor` for details.")
        raise UnsupportedError(f"Backend {backend.name} cannot run here: {reason}.", hint) from None

    informative = {
        "host": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "moetune": __version__,
        "probed_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if not device.startswith("cuda"):
        cpu = cpu_model()
        strict = {"cpu": cpu, "threads": str(torch.get_num_threads()), "torch": str(torch.__version__)}
        return Environment(device=cpu, strict={**strict, **own}, informative=informative)
    major, minor = torch.cuda.get_device_capability(device)
    strict = {
        "compute_capability": f"{major}.{minor}",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
    }
    return Environment(
        device=torch.cuda.get_device_name(device),
        strict={**strict, **own},
        informative={**informative, **gpu_state(str(torch.cuda.get_device_properties(device).uuid))},
    )


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the CPU's marketing name, or its architecture if the system does not report the name.

    Args:
        cpuinfo: the file to read it from.
    """
    try:
        for line in cpuinfo.read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def gpu_state(uuid: str) -> dict[str, str]:
    """Returns the current driver, clocks and power limit of a GPU from nvidia-smi, or {} if it cannot run.

    Args:
        uuid: the GPU's UUID, with or without the prefix `GPU-`.
    """
    return dict(zip(SMI_FIELDS.values(), queried(uuid, SMI_FIELDS), strict=False))


def queried(uuid: str, fields: Iterable[str]) -> list[str]:
    """Returns what nvidia-smi says of some fields of a GPU, or [] if it cannot run or does not know one of them.

    Args:
        uuid: the GPU's UUID, with or without the prefix `GPU-`.
        fields: names from `nvidia-smi --help-query-gpu`.
    """
    command = ["nvidia-smi", f"--id=GPU-{uuid.removeprefix('GPU-')}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            [*command, f"--query-gpu={','.join(fields)}"],
            capture_output=True, text=True, errors="replace", timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in answer.strip().split(",")]


def _devices() -> list[str]:
    import torch

    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
