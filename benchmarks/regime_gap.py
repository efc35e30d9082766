"""Measures how much slower tactics are that were tuned under load A and run under load B.

Each (layer, ep, load) is tuned as a user tunes it, by `moetune.tune` with a list of buckets. A cell is one (layer, ep,
load B, rows). In each cell three kinds of tactics are timed interleaved on draws that no tune used: B's own choice,
the choices of every other load A at the same rows, and the engine's default. B's own is timed twice (A/A). Pure EP has
the same load as `allgather`.

A finished tune or cell is a line of the journal, and a finished bucket is in the store beside the journal, so a stopped
run continues where it was. `--report` prints a journal's results and measures nothing.

    python benchmarks/regime_gap.py --gpus 4 --seconds 300 --journal gap.jsonl --out gap.json
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from common import LOADS, Journal
from regime_gap_report import COMPARED, DEFAULT, markdown, require_same_environment, summary

import moetune
from moetune import stats
from moetune.backends.base import Backend, Problem
from moetune.backends.registry import backend as backend_of
from moetune.errors import UsageError
from moetune.inputs.presets import layer as layer_of
from moetune.measure.bench import Bench
from moetune.measure.clock import Clock, CpuClock, CudaClock
from moetune.measure.compiling import Compilers, capability_of
from moetune.measure.probe import environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.tuning.events import BucketStarted, Event
from moetune.workload.draws import as_draws, untouched
from moetune.workload.routing import realize

MODELS = ("qwen3-235b-a22b", "deepseek-r1")
EP_SIZES = (8, 32)
ROWS = (16, 64, 256, 1024, 4096)
CELL_SECONDS = 1.0
"""About how long the interleaved rounds of one cell may take."""
ROUNDS = (3, 12)
"""The least and the most rounds over all draws of a cell."""
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Tuning:
    """One tune of all buckets. Its fields find its line in the journal."""

    model: str
    ep: int
    load: str
    ladder: str
    kind: str = "tuned"


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison under `load`."""

    model: str
    ep: int
    load: str
    ladder: str
    rows: int
    kind: str = "cell"


Job = Tuning | Cell
Attempt = tuple[dict[str, Any] | None, str | None]
"""A job's line, or the reason why it failed."""


class _TimeUpError(Exception):
    """The time is up, so no further bucket may start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="presets, or paths to a config.json")
    parser.add_argument("--ep", default=",".join(map(str, EP_SIZES)))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--loads", default=",".join(COMPARED))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--gpus", type=int, default=1, help="the number of GPUs that share the jobs; 0 means the CPU")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="start no bucket and no cell after this many seconds"
    )
    parser.add_argument("--journal", type=Path, default=Path("regime_gap.jsonl"))
    parser.add_argument("--out", type=Path, help="the file for the results as JSON; the Markdown is printed")
    parser.add_argument("--report", action="store_true", help="print the journal's results; measure nothing")
    options = parser.parse_args()
    tunings, cells, left_out = plan(
        options.models.split(","), numbers(options.ep), options.loads.split(","), numbers(options.rows)
    )
    journal = Journal(options.journal)
    begin = time.time()
    unfinished = [] if options.report else measure_all(options, journal, tunings, cells, begin + options.seconds)
    document = result(journal, tunings, cells, left_out + unfinished, options)
    print(f"\n{time.time() - begin:.0f} s on {options.gpus} GPUs\n", file=sys.stderr)
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(markdown(document["cells"], document["tunings"], document["left_out"]))


def numbers(text: str) -> list[int]:
    """Returns the numbers of a list: `[8, 32]` for `"8,32"`."""
    return [int(part) for part in text.split(",")]


def regime_of(ep: int, load: str, ladder: str) -> Regime:
    """Returns the regime of a load. Its distribution is set, so that no environment variable changes it."""
    return Regime(ep_size=ep, ladder=ladder, distribution="random", **LOADS[load])


def plan(
    models: Sequence[str], ep_sizes: Sequence[int], loads: Sequence[str], rows: Sequence[int]
) -> tuple[list[Tuning], list[Cell], list[str]]:
    """Returns all tunes, the slow ones first, all cells, and a line for everything that is left out.

    The models alternate, so that GPUs that start together do not compile the same kernels.
    """
    if unknown := set(loads) - set(COMPARED):
        raise SystemExit(f"Unknown loads {sorted(unknown)}. Loads: {', '.join(COMPARED)}.")
    ladder = ",".join(map(str, sorted(set(rows))))
    tunings, left_out = [], []
    for ep in ep_sizes:
        for load in reversed(COMPARED):
            if load not in loads:
                continue
            try:
                skipped = regime_of(ep, load, ladder).skipped_buckets
            except UsageError as error:
                left_out.append(f"{load} at EP{ep}: {error.message}")
                continue
            tunings += [Tuning(model, ep, load, ladder) for model in models]
            left_out += [f"{load} at EP{ep}, {size} rows: a pool has ep equal blocks" for size in skipped]
    cells = [
        Cell(t.model, t.ep, t.load, ladder, size)
        for t in tunings
        for size in reversed(regime_of(t.ep, t.load, ladder).buckets)
    ]
    return tunings, cells, left_out


def next_job(tunings: Sequence[Tuning], cells: Sequence[Cell], done: set[Job], begun: set[Job]) -> Job | None:
    """Returns a cell for which all tunes are done, else the next tune, else None."""
    for cell in cells:
        of_cell = {t for t in tunings if (t.model, t.ep) == (cell.model, cell.ep)}
        if cell not in done | begun and of_cell <= done:
            return cell
    return next((tuning for tuning in tunings if tuning not in done | begun), None)


def measure_all(
    options: argparse.Namespace, journal: Journal, tunings: Sequence[Tuning], cells: Sequence[Cell], end: float
) -> list[str]:
    """Runs the jobs that the journal lacks, with one process per GPU, until the time is up.

    After a job that raises, its process ends, because the GPU may be unusable there. Other jobs continue, and the next
    run tries the job again.

    Returns:
        A line for each job that was not measured, with the reason.
    """
    jobs: list[Job] = [*tunings, *cells]
    done: set[Job] = {job for job in jobs if journal.find(**asdict(job))}
    begun: set[Job] = set()
    errors: dict[Job, str] = {}
    store = options.journal.with_suffix(".store")
    devices = [f"cuda:{index}" for index in range(options.gpus)] or ["cpu"]
    pools: dict[str, ProcessPoolExecutor] = {}
    running: dict[Future[Attempt], tuple[str, Job]] = {}
    backend, processes = backend_of(options.backend), max(1, len(os.sched_getaffinity(0)) // 8)
    with Compilers(backend, capability_of(devices[0]), processes) as compilers:
        while True:
            for place, device in enumerate(devices):
                busy = any(device == taken for taken, _ in running.values())
                if not busy and time.time() < end and (job := next_job(tunings, cells, done, begun)):
                    pool = pools.get(device) or pools.setdefault(device, _pool(device, place, len(devices)))
                    work, last = (
                        (tune_job, store) if isinstance(job, Tuning) else (cell_job, tactics_of(job, journal, tunings))
                    )
                    task = pool.submit(attempt, work, job, options.backend, device, end, last)
                    running[task] = device, job
                    begun.add(job)
            if not running:
                break
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                device, job = running.pop(task)
                line, error = (None, "its process died") if task.exception() else task.result()
                if error:
                    errors[job] = error
                    print(f"{named(job)}: {error}", file=sys.stderr, flush=True)
                    pools.pop(device).shutdown()
                if line is None:
                    continue
                if journal.lines:
                    require_same_environment(journal.lines[0], line)
                journal.add(**line)
                if isinstance(job, Tuning):
                    request_elsewhere(compilers, job, line, cells)
                done.add(job)
                print(f"{named(job)}: {line['seconds']:.1f} s on {device}", file=sys.stderr, flush=True)
    for pool in pools.values():
        pool.shutdown()
    return [f"{named(job)}: {errors.get(job, 'left for the next run')}" for job in jobs if job not in done]


def request_elsewhere(compilers: Compilers, tuning: Tuning, line: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Requests the compilation of a tune's choices for the other loads, so that no GPU has to wait for it."""
    chosen = {choice["rows"]: Tactic(choice["tactic"]) for choice in line["choices"]}
    for cell in cells:
        if (cell.model, cell.ep) == (tuning.model, tuning.ep) and cell.load != tuning.load and cell.rows in chosen:
            regime = regime_of(cell.ep, cell.load, cell.ladder)
            compilers.request(layer_of(cell.model), regime, cell.rows, [chosen[cell.rows]])


def attempt(work: Callable[..., dict[str, Any]], *arguments: Any) -> Attempt:
    """Returns the line of a job, or the reason why it failed, or neither if the time is up.

    It returns the reason as text, so that no exception has to be pickled.
    """
    try:
        return work(*arguments), None
    except _TimeUpError:
        return None, None
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def named(job: Job) -> str:
    """Returns a name of the job for messages."""
    rows = f"{job.rows} rows" if isinstance(job, Cell) else "the tune"
    return f"{job.model} EP{job.ep} {job.load}, {rows}"


def tactics_of(cell: Cell, journal: Journal, tunings: Sequence[Tuning]) -> dict[str, Tactic]:
    """Returns, by load, the tactic that its tune chose at the cell's rows, and the default tactic.

    A load whose tune has no such bucket has no entry.
    """
    tactics: dict[str, Tactic] = {}
    for tuning in tunings:
        if (tuning.model, tuning.ep) != (cell.model, cell.ep):
            continue
        line = journal.find(**asdict(tuning))
        assert line is not None
        for choice in line["choices"]:
            if choice["rows"] == cell.rows:
                tactics[tuning.load] = Tactic(choice["tactic"])
                if tuning.load == cell.load:
                    tactics[DEFAULT] = Tactic(choice["default_tactic"])
    return tactics


def tune_job(job: Tuning, backend_name: str, device: str, end: float, store: Path) -> dict[str, Any]:
    """Runs one tune and returns its line. A bucket that the store has is not measured again."""
    begin = time.perf_counter()

    def stop(event: Event) -> None:
        if isinstance(event, BucketStarted) and time.time() > end:
            raise _TimeUpError

    layer, regime = layer_of(job.model), regime_of(job.ep, job.load, job.ladder)
    profile = moetune.tune(layer, regime, backend_name, store, device=device, isolate=False, on_event=stop)
    _free(device)
    choices = [
        choice.model_dump(mode="json", include=_KEPT)
        | {"rejected": [[dict(each.tactic), each.reason] for each in choice.rejected]}
        for choice in profile.choices
    ]
    return {
        **asdict(job),
        "environment": profile.environment.model_dump(mode="json"),
        "seconds": round(time.perf_counter() - begin, 2),
        "choices": choices,
    }


_KEPT = {"rows", "tactic", "time_us", "default_tactic", "default_time_us", "gain", "noise", "tried", "measured_at"}


def cell_job(job: Cell, backend_name: str, device: str, end: float, tactics: Mapping[str, Tactic]) -> dict[str, Any]:
    """Measures one cell and returns its line."""
    if time.time() > end:
        raise _TimeUpError
    begin = time.perf_counter()
    backend = backend_of(backend_name)
    layer, regime = layer_of(job.model), regime_of(job.ep, job.load, job.ladder)
    compared = compare(layer, regime, job.rows, backend, device, tactics, job.load)
    _free(device)
    return {
        **asdict(job),
        "environment": environment(backend, device).model_dump(mode="json"),
        "seconds": round(time.perf_counter() - begin, 2),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **compared,
    }


def compare(
    layer: MoELayer,
    regime: Regime,
    rows: int,
    backend: Backend,
    device: str,
    tactics: Mapping[str, Tactic],
    own_load: str,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Compares the distinct tactics of `tactics` with that of `own_load`, on draws that no tune used.

    The own tactic is timed twice in each round.

    Returns:
        `own_us`: the mean of both series of the own tactic, or None if it failed.
        `noise`: the A/A noise, or None if the own tactic failed.
        `samples`: the number of timings of each tactic.
        `entries`: one for each distinct tactic, with its mean time `us` and the `ratio` to the own tactic with its 95 %
        bounds, or with the reason why it `failed`. `ratio` is None if the own tactic failed.
    """
    draws = untouched(regime.draws)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # a grouped router takes 0.6 s a draw
        routings = tuple(threads.map(lambda draw: realize(layer, regime, rows, draw=draw), draws))
    problem = Problem(layer, regime, rows, regime.shard(layer), as_draws(routings), device)
    clock = clock or (CudaClock(device) if device.startswith("cuda") else CpuClock())
    bench = Bench(backend, problem, clock)
    own = tactics[own_load]
    others = [tactic for tactic in dict.fromkeys(tactics.values()) if tactic != own]
    for tactic in (own, *others):
        bench.check(tactic, 0)
    timed = (own, *others, own)
    once = bench.samples(timed, [0])
    round_us = len(routings) * sum(series[0] for series in once if series)
    least, most = ROUNDS
    rounds = min(most, max(least, int(CELL_SECONDS * 1e6 / max(round_us, 1.0))))
    series = bench.samples(timed, list(range(len(routings))) * rounds)
    first, again = series[0], series[-1]
    mine = [(a + b) / 2 for a, b in zip(first, again, strict=True)] if first and again else None
    entries = []
    for tactic, times in zip((own, *others), (mine, *series[1:-1]), strict=True):
        entry: dict[str, Any] = {
            "tactic": dict(tactic),
            "tuned_under": [under for under, chosen in tactics.items() if chosen == tactic],
        }
        if not times:
            entries.append(entry | {"failed": bench.failures[tactic]})
            continue
        against = stats.paired_ratio(times, mine) if mine else None
        entries.append(
            entry
            | {"us": round(sum(times) / len(times), 3), "ratio": against and against.value}
            | ({"ratio_low": against.low, "ratio_high": against.high} if against else {})
        )
    return {
        "own_us": round(sum(mine) / len(mine), 3) if mine else None,
        "noise": stats.noise_floor(first, again) if first and again else None,
        "samples": len(routings) * rounds,
        "entries": entries,
    }


def result(
    journal: Journal,
    tunings: Sequence[Tuning],
    cells: Sequence[Cell],
    left_out: Sequence[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the journal's results of this plan as one document."""
    measured = [line for cell in cells if (line := journal.find(**asdict(cell)))]
    tuned = [line for tuning in tunings if (line := journal.find(**asdict(tuning)))]
    return {
        "schema_version": SCHEMA_VERSION,
        "backend": options.backend,
        "gpus": options.gpus,
        "environment": next((line["environment"] for line in tuned), None),
        "summary": summary(measured),
        "cells": [{name: value for name, value in line.items() if name != "environment"} for line in measured],
        "tunings": [{name: value for name, value in line.items() if name != "environment"} for line in tuned],
        "left_out": list(left_out),
    }


def _pool(device: str, place: int, places: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_settle, initargs=(device, place, places))


def _settle(device: str, place: int, places: int) -> None:
    """Restricts this process and its compilers to their share of the cores and to one GPU."""
    cores = sorted(os.sched_getaffinity(0))
    share = cores[place::places] or cores
    os.sched_setaffinity(0, share)
    torch.set_num_threads(len(share))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
