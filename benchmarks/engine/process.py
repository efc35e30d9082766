"""One measured process of an arm, or one for each rank: its environment, its time limit, its log and its result."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import ROUTING, Arm, Folders
from cases import Case
from common import Journal
from ep_share import VARIABLE, write_entry_point

HERE = Path(__file__).resolve().parent
DROPPED = ("MOETUNE_REGIME", "VLLM_TUNED_CONFIG_FOLDER", VARIABLE, "VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
"""Variables of the caller that no process of an arm may inherit."""

_running: set[subprocess.Popen[bytes]] = set()


def end_all() -> None:
    """Ends all processes of arms that run now."""
    for child in tuple(_running):
        _kill(child)


@dataclass(frozen=True)
class Measurement:
    """What each process measures; see `child.measure`."""

    running: tuple[int, ...]
    passes: int
    steps: int
    memory: float
    layers: int
    profile: bool


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        work: the folder of logs, caches and models.
        gpus: the GPUs, as in CUDA_VISIBLE_DEVICES.
        timeout_s: how long a process may take.
    """

    work: Path
    gpus: tuple[str, ...]
    timeout_s: float

    @property
    def own(self) -> Path:
        """The folder of caches that no other GPU uses at the same time."""
        return self.work / f"gpu{'-'.join(self.gpus)}"


def environment(case: Case, arm: Arm, folders: Folders, place: Place, fresh: Path) -> dict[str, str]:
    """Returns the variables of an arm's process. `fresh` is a folder for caches that must be empty at the start."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    plugin = place.work / "plugin"
    before = [str(HERE), *([str(plugin)] if case.share_of else []), *filter(None, [kept.get("PYTHONPATH")])]
    if case.share_of:
        write_entry_point(plugin)
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(before),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(place.gpus),
        "MOETUNE_STORE": str(place.own / "store"),
        "TRITON_CACHE_DIR": str(place.own / "triton"),
        "VLLM_CACHE_ROOT": str(place.own / "vllm"),
        "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR": str(fresh / "flashinfer"),
        "FLASHINFER_AUTOTUNE_CACHE_DIR": str(fresh / "flashinfer-managed"),
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": ROUTING,
        # PyTorch's profiler and CUDA graphs in one process
        "DISABLE_CUPTI_LAZY_REINIT": "1",
        "TEARDOWN_CUPTI": "0",
        **({VARIABLE: str(case.share_of)} if case.share_of else {}),
        **case.environment,
        **arm.environment(case, folders),
    }


def run(case: Case, arm: Arm, rep: int, folders: Folders, place: Place, what: Measurement) -> dict[str, Any]:
    """Runs one process for each rank, waits, ends what is left of them, and keeps their logs compressed.

    Returns:
        `seconds`, the exit codes, the ranks' results and logs. An exit code of None means the time limit.
    """
    tag = f"{case.name}-{arm.name}-{rep}"
    logs = place.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f"{tag}-"))
    model = place.own / "models" / f"{case.name}-{what.layers}"
    case.write_model(model, what.layers)
    variables = environment(case, arm, folders, place, fresh)
    paths = [logs / f"{tag}-r{rank}.log" for rank in range(case.ranks)]
    results = [fresh / f"result-{rank}.jsonl" for rank in range(case.ranks)]
    words = _words(case, arm, model, what, fresh)
    began = time.monotonic()
    children = []
    port = _free_port()
    try:
        for rank, (log, result) in enumerate(zip(paths, results, strict=True)):
            with log.open("wb") as output:
                child = subprocess.Popen(
                    [sys.executable, str(HERE / "child.py"), *words, "--result", str(result)],
                    env={**variables, **_rank_variables(case, rank, port)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            children.append(child)
            _running.add(child)
        codes = _wait(children, began + place.timeout_s)
    finally:
        for child in children:
            _end(child)
    texts = [path.read_text(errors="replace") for path in paths]
    found = {
        "seconds": round(time.monotonic() - began, 1),
        "exit_codes": codes,
        "ranks": [Journal(result).lines for result in results],
        "logs": texts,
        "log_files": [_compressed(path).name for path in paths],
    }
    shutil.rmtree(fresh, ignore_errors=True)
    return found


def _words(case: Case, arm: Arm, model: Path, what: Measurement, fresh: Path) -> list[str]:
    running = ",".join(map(str, what.running))
    words = [case.name, "--model", str(model), "--moe-backend", arm.moe_backend, "--running", running]
    words += ["--passes", str(what.passes), "--steps", str(what.steps), "--memory", str(what.memory)]
    if case.ranks > 1:
        marks = fresh / "marks"
        marks.mkdir()
        words += ["--marks", str(marks)]
    return [*words, *(["--profile"] if what.profile else [])]


def _rank_variables(case: Case, rank: int, port: int) -> Mapping[str, str]:
    """Returns the variables of vLLM's offline data parallelism, one engine a rank."""
    if case.ranks == 1:
        return {}
    return {
        "VLLM_DP_RANK": str(rank),
        "VLLM_DP_RANK_LOCAL": str(rank),
        "VLLM_DP_SIZE": str(case.ranks),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(port),
    }


def _wait(children: Sequence[subprocess.Popen[bytes]], end: float) -> list[int | None]:
    """Returns the exit codes. If one rank fails, the others are not waited for."""
    while time.monotonic() < end:
        codes = [child.poll() for child in children]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.1)
    return [child.poll() for child in children]


def _end(child: subprocess.Popen[bytes]) -> None:
    _kill(child)
    child.wait()
    _running.discard(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kills all processes of a child's session, those of the engine too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _compressed(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    with path.open("rb") as log, gzip.open(packed, "wb") as file:
        shutil.copyfileobj(log, file)
    path.unlink()
    return packed
