"""Measures stock vLLM with dummy weights: decode steps and prefills, in arms that differ in what tunes the experts.

Each arm's engine is a process of its own, and the arms alternate, in an order that turns. A finished process is a line
of OUT/engine.jsonl, so the same command goes on where it was cut. See README.md beside this file for the commands on a
GPU host.

    python benchmarks/engine/run.py measure OUT --cases qwen3-30b --gpus 0
    python benchmarks/engine/run.py report OUT/engine.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import glob
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import process
from arms import ARMS, TRITON, Arm, Folders, counted, missing_proof, sweep_s, telling_lines
from cases import CASES, RUNNING, Case
from common import Journal
from engine_report import report
from process import Measurement, Place


class Task(NamedTuple):
    """One process that is to run."""

    case: Case
    arm: Arm
    rep: int


class Device(NamedTuple):
    """The GPUs of this host: their name and the memory of one in bytes."""

    name: str
    memory: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="run what is not yet in the journal")
    measure.add_argument("out", type=Path)
    measure.add_argument("--cases", default="qwen3-30b", help=f"comma-separated, of {', '.join(CASES)}")
    measure.add_argument("--arms", default=",".join(ARMS), help="comma-separated, in the order in which they run")
    measure.add_argument("--reps", type=int, default=3, help="how often each arm runs")
    measure.add_argument("--gpus", default="0", help="comma-separated; each repetition runs on one of them")
    measure.add_argument("--seconds", type=float, default=420.0, help="start no process after this many seconds")
    measure.add_argument("--process-seconds", type=float, default=240.0, help="end a process after this many seconds")
    measure.add_argument("--running", default=",".join(map(str, RUNNING)), help="numbers of sequences on each rank")
    measure.add_argument("--passes", type=int, default=2, help="how often a process measures each number")
    measure.add_argument("--steps", type=int, default=56, help="tokens of each sequence in a decode measurement")
    measure.add_argument("--layers", type=int, help="the most layers  [default: as many as fit]")
    measure.add_argument("--memory", type=float, default=0.92, help="vLLM's --gpu-memory-utilization")
    shown = commands.add_parser("report", help="print Markdown; exits 1 if a moetune arm is slower, or a proof missing")
    shown.add_argument("journal", type=Path)
    options = parser.parse_args()
    if options.command == "report":
        text, failed = report(Journal(options.journal).lines)
        print(text)
        sys.exit(int(failed))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_signal)
    sys.exit(measure_all(options, device()))


def device() -> Device:
    """Returns the first GPU. Another process asks, so that this one has no CUDA context."""
    question = (
        "import torch; found = torch.cuda.get_device_properties(0); print(found.name, found.total_memory, sep=',')"
    )
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True).stdout
    name, memory = answer.strip().rsplit(",", 1)
    return Device(name, float(memory))


def end_at_signal(number: int, _: object) -> None:
    """Ends the engines, which are in sessions of their own, and this process."""
    process.end_all()
    os._exit(128 + number)


def measure_all(options: argparse.Namespace, gpu: Device) -> int:
    """Runs what is missing. Returns 1 if a process failed or proved nothing."""
    end = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.out.resolve()
    journal, lock = Journal(work / "engine.jsonl"), threading.Lock()
    failures: list[str] = []
    for case in (CASES[name] for name in options.cases.split(",")):
        if time.monotonic() >= end:
            failures.append(f"{case.name}: the time is up")
            break
        arms = [ARMS[name] for name in options.arms.split(",")]
        arms = [arm for arm in arms if arm.moe_backend == TRITON or case.flashinfer]
        folders = prepared(case, arms, work, gpu, options.gpus.split(",")[0])
        arms = [arm for arm in arms if not _left_out(journal, case, arm, folders, gpu)]
        places = list(_places(options, case, work))
        what = Measurement(
            tuple(int(number) for number in options.running.split(",")),
            options.passes,
            options.steps,
            options.memory,
            case.layers(gpu.memory, options.layers),
            profile=True,
        )

        def work_through(index: int, place: Place, case: Case = case, what: Measurement = what) -> None:
            for task in tasks(case, arms, range(index, options.reps, len(places))):  # noqa: B023
                with lock:
                    done = journal.find(kind="run", case=case.name, arm=task.arm.name, rep=task.rep, ok=True)
                if done is None and time.monotonic() >= end:
                    failures.append(f"{case.name}, {task.arm.name}: the time is up")
                elif done is None:
                    once = replace(what, profile=task.rep == 0)
                    line = one(task, folders, place, once, gpu)  # noqa: B023
                    with lock:
                        journal.add(**line)
                        failures.extend(_said(line))

        threads = [threading.Thread(target=work_through, args=(index, place)) for index, place in enumerate(places)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return int(bool(failures))


def tasks(case: Case, arms: Sequence[Arm], reps: Sequence[int]) -> Iterator[Task]:
    """Yields all arms of a repetition, then those of the next one, which begins with another arm.

    So a GPU's first process, which starts cold, is not always the same arm's.
    """
    for rep in reps:
        turn = rep % len(arms) if arms else 0
        for arm in [*arms[turn:], *arms[:turn]]:
            yield Task(case, arm, rep)


def one(task: Task, folders: Folders, place: Place, what: Measurement, gpu: Device) -> dict[str, Any]:
    """Runs one task. Returns its line for the journal."""
    case, arm, rep = task
    print(f"{case.name} {arm.name} {rep} on GPU {','.join(place.gpus)} ...", flush=True)
    _copy_store(place)
    found = process.run(case, arm, rep, folders, place, what)
    logs = found.pop("logs")
    complete = all(any(line["what"] == "end" for line in rank) for rank in found["ranks"])
    return {
        "kind": "run",
        "case": case.name,
        "arm": arm.name,
        "rep": rep,
        "ok": complete,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": gpu.name,
        "gpus": ",".join(place.gpus),
        "layers": what.layers,
        **found,
        "missing": missing_proof(arm, case, logs, folders),
        "counts": [counted(log) for log in logs],
        "sweep_s": [sweep_s(log) for log in logs],
        "lines": [telling_lines(log) for log in logs],
        "last_lines": [] if complete else [log.splitlines()[-30:] for log in logs],
    }


def prepared(case: Case, arms: Sequence[Arm], work: Path, gpu: Device, first: str) -> Folders:
    """Returns the folders that the arms read. `moetune tune` measures what is not in OUT/store.

    Raises:
        SystemExit: moetune has written no file for the case's shape.
    """
    name = case.file_name(gpu.name)
    empty, tuned = work / "empty" / case.name, work / "tuned" / case.name
    empty.mkdir(parents=True, exist_ok=True)
    (empty / name).write_text("{}")
    found = sorted(tuned.rglob(glob.escape(name)))
    if not found and any(arm.name in ("moetune", "plugin-triton") for arm in arms):
        line, store = case.line(TRITON), str(work / "store")
        command = [sys.executable, "-m", "moetune", "tune", "--launch", line, "--backend", "triton", "--store", store]
        command += ["--export", str(tuned), "--for-version", importlib.metadata.version("vllm")]
        print(" ".join(command), flush=True)
        visible = {**os.environ, "CUDA_VISIBLE_DEVICES": first}
        subprocess.run(command, env=visible, cwd=work, check=False)  # not the checkout's package
        found = sorted(tuned.rglob(glob.escape(name)))
        if not found:
            raise SystemExit(f"moetune has written no {name} below {tuned}.")
    return Folders(empty, _shipped_folder(), found[0].parent if found else tuned)


def _shipped_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed here.")
    return Path(next(iter(spec.submodule_search_locations))).resolve() / "model_executor/layers/fused_moe/configs"


def _left_out(journal: Journal, case: Case, arm: Arm, folders: Folders, gpu: Device) -> bool:
    """Returns whether vLLM ships no file for the shape, so that this arm would be the default; that is a line too."""
    name = case.file_name(gpu.name)
    if arm.name != "shipped" or (folders.shipped / name).exists():
        return False
    if journal.find(kind="left_out", case=case.name, arm=arm.name) is None:
        journal.add(kind="left_out", case=case.name, arm=arm.name, why=f"vLLM ships no {name}: it runs its heuristic")
    return True


def _places(options: argparse.Namespace, case: Case, work: Path) -> Iterator[Place]:
    """Yields as many places as the GPUs allow.

    Raises:
        SystemExit: the case needs more GPUs.
    """
    gpus = options.gpus.split(",")
    if len(gpus) < case.ranks:
        raise SystemExit(f"{case.name} needs {case.ranks} GPUs, given --gpus {options.gpus}.")
    for at in range(0, len(gpus) - case.ranks + 1, case.ranks):
        yield Place(work, tuple(gpus[at : at + case.ranks]), options.process_seconds)


def _copy_store(place: Place) -> None:
    """Copies the store of `moetune tune` to the place's own one, which the plugin then adds to."""
    if (place.work / "store").exists():
        shutil.copytree(place.work / "store", place.own / "store", dirs_exist_ok=True)


def _said(line: dict[str, Any]) -> list[str]:
    """Prints what came of a process. Returns what failed."""
    problems = [f"no {missing}" for missing in line["missing"]]
    if not line["ok"]:
        problems.append(f"exit codes {line['exit_codes']}")
    state = "; ".join(problems) or "ok"
    print(f"{line['case']} {line['arm']} {line['rep']}: {line['seconds']} s, {state}", flush=True)
    for text in line["last_lines"][0][-12:] if line["last_lines"] else ():
        print("    " + text[:240], flush=True)
    return problems


if __name__ == "__main__":
    main()
