"""The arms: how vLLM is started in each, and the lines of its log that prove what answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cases import Case
from ep_share import LINE as SHARE_LINE

from moetune.export.engine_log import parsed_log

ROUTING: Final = "uniform_random"
TRITON, FLASHINFER = "triton", "flashinfer_cutlass"
_LINE: Final = re.compile(
    r"Using configuration from|Using default MoE config|MoE backend out|moetune|[Aa]uto-?[Tt]un|Simulating MoE routing|"
    r"Model loading took|torch\.compile took|Graph capturing finished|init engine"
)
"""The lines that are kept of a log."""
_UNTELLING: Final = re.compile(
    r"engine options|\[AutoTuner\]: Tuning|Injected <class|CUDA graph memory profiling|Initializing a V1 LLM"
)
_BEFORE: Final = re.compile(r"^.*?\[[\w./]+:\d+\] ")
_LEFT: Final = re.compile(r"moetune: .*(are left to the engine|the engine's own configuration runs)")
_COUNTS: Final = re.compile(r"moetune: .*: buckets of flashinfer-cutlass: (\d+) served, (\d+) tuned, (\d+) missed")
_SWEEP: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*\[Autotuner\]: Autotuning process (starts|ends)")
"""FlashInfer's own lines (`autotune` in `flashinfer/autotuner`), by its formatter in `jit/core.py`."""
_MOST_LINES: Final = 60


@dataclass(frozen=True)
class Folders:
    """The folders of Triton configurations that arms read.

    Attributes:
        empty: has a file without any configuration for the case's shape.
        shipped: vLLM's own.
        tuned: moetune's export.
    """

    empty: Path
    shipped: Path
    tuned: Path


@dataclass(frozen=True)
class Arm:
    """One way to run the experts.

    Attributes:
        name: the arm's name.
        moe_backend: the value of `--moe-backend`.
        environment: the variables that it sets.
        proof: returns what is missing in the logs of an engine's ranks; nothing if the arm ran as it should.
        stock: the arm that moetune's is compared with; None for an arm without moetune.
        words: what it is, for the report.
    """

    name: str
    moe_backend: str
    environment: Callable[[Case, Folders], Mapping[str, str]]
    proof: Callable[[Sequence[str], Folders], list[str]]
    words: str
    stock: str | None = None


def _reads(folder: Callable[[Folders], Path]) -> Callable[[Sequence[str], Folders], list[str]]:
    """Returns a proof that all files that vLLM has read are in this folder. vLLM logs it on its first rank only."""

    def proof(logs: Sequence[str], folders: Folders) -> list[str]:
        missing = _kernels(logs, "TRITON")
        wanted = str(folder(folders))
        read = {(file.event, str(Path(file.path).parent)) for log in logs for file in parsed_log(log).files}
        if read != {("read", wanted)}:
            missing.append(f"`Using configuration from {wanted}/…`, alone; the log has {sorted(read) or 'none'}")
        if any("moetune: " in log for log in logs):
            missing.append("that moetune's plugin is not active; the log has lines of it")
        return missing

    return proof


def _kernels(logs: Sequence[str], name: str) -> list[str]:
    found = {kernels for log in logs for kernels in parsed_log(log).kernels}
    return [] if found == {name} else [f"`Using {name} … MoE backend`; the log has {sorted(found) or 'none'}"]


def _answered_by_plugin(logs: Sequence[str], folders: Folders) -> list[str]:
    """Returns what is missing. vLLM may also read a file, for buckets in which the engine's default is the choice."""
    missing = _kernels(logs, "TRITON")
    for rank, log in enumerate(logs):
        if not parsed_log(log).plugin:
            missing.append(f"`moetune: Triton experts …: profile of …` on rank {rank}")
        missing += [f"that rank {rank} has `{line}`" for line in telling_lines(log) if _LEFT.search(line)]
    return missing


def _tuned_by_flashinfer(logs: Sequence[str], folders: Folders) -> list[str]:
    missing = _kernels(logs, "FlashInfer CUTLASS")
    if not any("Autotuning process ends" in log for log in logs):
        missing.append("`[Autotuner]: Autotuning process ends`")
    if any("moetune: " in log for log in logs):
        missing.append("that moetune's plugin is not active; the log has lines of it")
    return missing


def _tuned_by_plugin(logs: Sequence[str], folders: Folders) -> list[str]:
    missing = _kernels(logs, "FlashInfer CUTLASS")
    for rank, log in enumerate(logs):
        counts = counted(log)
        if counts is None or not counts["served"] + counts["tuned"] or counts["missed"]:
            missing.append(f"`moetune: … buckets of flashinfer-cutlass: …, 0 missed` on rank {rank}; it has {counts}")
    return missing


def counted(log: str) -> dict[str, int] | None:
    """Returns how many buckets moetune's plugin has served, tuned and missed by the log's last line of it."""
    found = _COUNTS.findall(log)
    return dict(zip(("served", "tuned", "missed"), map(int, found[-1]), strict=True)) if found else None


def sweep_s(log: str) -> float | None:
    """Returns how long FlashInfer's tuning mode was on, in s; None if it was not. moetune's plugin measures in it."""
    total, began, found = 0.0, None, False
    for at, event in _SWEEP.findall(log):
        when = datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f")
        if event == "starts":
            began = when
        elif began is not None:
            total, began, found = total + (when - began).total_seconds(), None, True
    return round(total, 1) if found else None


def missing_proof(arm: Arm, case: Case, logs: Sequence[str], folders: Folders) -> list[str]:
    """Returns what the logs of an engine's ranks do not prove."""
    missing = arm.proof(logs, folders)
    if not any(f"Simulating MoE routing using a {ROUTING} strategy" in log for log in logs):  # only one rank logs it
        missing.append(f"`Simulating MoE routing using a {ROUTING} strategy`")
    for rank, log in enumerate(logs):
        if case.share_of and SHARE_LINE not in log:
            missing.append(f"`{SHARE_LINE} …` on rank {rank}")
    return missing


def telling_lines(log: str) -> list[str]:
    """Returns the lines of a log that say what answered and what the start cost, each once, without the prefix."""
    lines = [_BEFORE.sub("", line).strip() for line in log.splitlines() if _LINE.search(line)]
    return list(dict.fromkeys(line[:300] for line in lines if not _UNTELLING.search(line)))[:_MOST_LINES]


def _folder(folder: Callable[[Folders], Path]) -> Callable[[Case, Folders], Mapping[str, str]]:
    return lambda case, folders: {"VLLM_TUNED_CONFIG_FOLDER": str(folder(folders))}


def _regime(moe_backend: str) -> Callable[[Case, Folders], Mapping[str, str]]:
    return lambda case, folders: {"MOETUNE_REGIME": case.regime(moe_backend)}


_ARMS: Final = (
    Arm(
        "default",
        TRITON,
        _folder(lambda folders: folders.empty),
        _reads(lambda folders: folders.empty),
        "Triton experts, vLLM's heuristic: its file for the shape is overridden by one without configurations",
    ),
    Arm(
        "shipped",
        TRITON,
        lambda case, folders: {},
        _reads(lambda folders: folders.shipped),
        "Triton experts, the file that vLLM ships",
    ),
    Arm(
        "moetune",
        TRITON,
        _folder(lambda folders: folders.tuned),
        _reads(lambda folders: folders.tuned),
        "Triton experts, the file that moetune exports",
        stock="shipped",
    ),
    Arm("plugin-triton", TRITON, _regime(TRITON), _answered_by_plugin, "Triton experts, moetune's plugin", "shipped"),
    Arm(
        "flashinfer",
        FLASHINFER,
        lambda case, folders: {},
        _tuned_by_flashinfer,
        "FlashInfer's CUTLASS experts, as vLLM tunes them, anew at each start",
    ),
    Arm(
        "plugin-flashinfer",
        FLASHINFER,
        _regime(FLASHINFER),
        _tuned_by_plugin,
        "FlashInfer's CUTLASS experts, moetune's plugin; from the second start on served from its store",
        stock="flashinfer",
    ),
)
ARMS: Final[Mapping[str, Arm]] = {arm.name: arm for arm in _ARMS}
