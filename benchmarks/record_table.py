"""Records every tactic's time on this GPU, so that searches can be tested on any machine.

A cell is one load and one row count. In each cell every legal configuration is timed once on the same draws, in random
order. The best `--finalists` are then timed again, interleaved over all draws, and the best one twice (A/A). A finished
cell is a line of the journal, so a stopped run continues with the same journal. `--pack` turns a journal into the
compact table in tests/data/.

    python benchmarks/record_table.py --model qwen3-235b-a22b --journal qwen.jsonl --seconds 500 --gpus 4
    python benchmarks/record_table.py --pack qwen.jsonl --out tests/data/grouped_triton-qwen3-235b-a22b-ep8-h200.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from datetime import UTC, datetime
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch

from moetune import stats
from moetune.backends.base import Problem
from moetune.backends.grouped_triton import space
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.inputs.presets import layer as layer_of
from moetune.measure.clock import CudaClock, TimedCall
from moetune.measure.probe import environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

LOADS = {
    "packed": {"attention_dp": True, "layout": "packed"},
    "deduplicated": {"attention_dp": True, "layout": "deduplicated"},
    "allgather": {"attention_dp": True, "dispatch": "allgather"},
}
ROWS = (256, 16, 64, 1024, 4, 4096, 1, 8192)
COARSE_MS = 6.0
FINAL_SECONDS = 3.0
HOPELESS = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-235b-a22b")
    parser.add_argument("--ep", type=int, default=8)
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--finalists", type=int, default=20)
    parser.add_argument("--journal", type=Path, default=Path("table.jsonl"))
    parser.add_argument("--seconds", type=float, default=540.0, help="start no cell after this many seconds")
    parser.add_argument("--gpus", type=int, default=1, help="the number of GPUs that share the cells")
    parser.add_argument("--limit", type=int, help="time only this many configurations, for a trial")
    parser.add_argument("--pack", type=Path, help="a journal to pack into --out; measure nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.pack:
        options.out.write_text(json.dumps(pack(options.pack), separators=(",", ":")) + "\n")
        return
    record(options)


def record(options: argparse.Namespace) -> None:
    """Measures the cells that the journal lacks, until the time is up."""
    start = time.perf_counter()
    layer, backend = layer_of(options.model), TritonBackend()
    lines = options.journal.read_text().splitlines() if options.journal.exists() else []
    done = {(cell["load"], cell["rows"]) for cell in map(json.loads, lines)}
    cells = [(load, int(rows)) for rows in options.rows.split(",") for load in options.loads.split(",")]
    widest = Regime(ep_size=options.ep, attention_dp=True)
    everything = backend.candidates(layer, widest, 8192, "cuda").tactics[: options.limit]
    compile_ahead(space.Shapes.of(layer, widest, 8192), everything)
    print(f"compiled {len(everything)} configurations in {time.perf_counter() - start:.0f} s", flush=True)
    missing = [cell for cell in cells if cell not in done]
    end = time.time() + options.seconds - (time.perf_counter() - start)
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()
    for index in range(options.gpus):
        devices.put(f"cuda:{index}")
    with context.Pool(options.gpus, _take_device, (devices,)) as pool:
        for line, cell in pool.imap_unordered(partial(_record_cell, options, end), missing):
            if cell:
                with options.journal.open("a") as journal:
                    journal.write(json.dumps(cell, separators=(",", ":")) + "\n")
            print(line, flush=True)


_DEVICE = "cuda"


def _take_device(devices: SimpleQueue[str]) -> None:
    global _DEVICE
    _DEVICE = devices.get()
    torch.cuda.set_device(_DEVICE)


def _record_cell(
    options: argparse.Namespace, end: float, cell_of: tuple[str, int]
) -> tuple[str, dict[str, Any] | None]:
    """Measures one cell on this process's GPU. Returns a line about it and the cell, or None if the time is up."""
    load, rows = cell_of
    if time.time() > end:
        return f"{load} {rows}: left for the next run", None
    begin = time.perf_counter()
    regime = Regime(ep_size=options.ep, **LOADS[load])
    cell = {"load": load, **measure(layer_of(options.model), TritonBackend(), regime, rows, options)}
    best = min(cell["finalists"], key=lambda entry: stats.median(entry["rounds_us"]))
    line = (
        f"{load:>12} {rows:>5} rows: best {stats.median(best['rounds_us']):9.1f} us of {len(cell['single_us'])}"
        f" ({len(cell['failures'])} failed), default {cell['default_us']:9.1f} us, A/A {cell['noise']:.2%},"
        f" {time.perf_counter() - begin:.0f} s on {_DEVICE}"
    )
    return line, cell


def compile_ahead(shapes: space.Shapes, tactics: tuple[Tactic, ...]) -> None:
    """Compiles every tactic's kernels into Triton's cache, with one process per core."""
    capability = torch.cuda.get_device_capability()
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        list(pool.imap_unordered(partial(_compile, shapes, capability), list(tactics), chunksize=4))


def _compile(shapes: space.Shapes, capability: tuple[int, int], tactic: Tactic) -> None:
    from triton_numerics import compile_tactic

    try:
        compile_tactic(shapes, tactic, capability=capability)
    except Exception as error:
        print(f"{tactic}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def measure(
    layer: MoELayer, backend: TritonBackend, regime: Regime, rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures one cell: single timings of all tactics, and interleaved timings of the best ones."""
    routings = tuple(realize(layer, regime, rows, draw=draw) for draw in range(regime.draws))
    problem = Problem(layer, regime, rows, regime.shard(layer), as_draws(routings), _DEVICE)
    runner, clock = backend.prepare(problem), CudaClock(_DEVICE)
    tactics = list(backend.candidates(layer, regime, rows, _DEVICE).tactics[: options.limit])
    default = backend.default(layer, regime, rows)
    random.Random(0).shuffle(tactics)
    single: dict[Tactic, float] = {}
    failures: dict[Tactic, str] = {}
    hopeless = 0
    clock.warm_up(partial(runner.run, default), 0)
    fastest_us = time_once(partial(runner.run, default))
    draws = range(max(2, min(regime.draws, int(COARSE_MS * 1e3 / fastest_us))))
    begin = time.perf_counter()
    for tactic in tactics:
        call = partial(runner.run, tactic)
        try:
            clock.warm_up(call, 0)
            once_us = time_once(call)
            if once_us > max(HOPELESS * fastest_us, 1000.0):
                single[tactic], hopeless = once_us, hopeless + 1
                continue
            samples = clock.paired_samples([call], draws)[0]
            single[tactic] = sum(samples) / len(samples)
            fastest_us = min(fastest_us, single[tactic])
        except Exception as error:
            failures[tactic] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    print(
        f"{1e3 * (time.perf_counter() - begin) / len(tactics):.1f} ms a configuration, {len(draws)} draws", flush=True
    )
    ranked = sorted(single, key=lambda tactic: single[tactic])[: options.finalists]
    final = [*ranked, *([] if default in ranked else [default]), ranked[0]]
    round_us = sum(single[tactic] for tactic in final) * regime.draws
    rounds = max(5, min(15, int(FINAL_SECONDS * 1e6 / round_us)))
    series = clock.paired_samples([partial(runner.run, t) for t in final], list(range(regime.draws)) * rounds)
    by_round = [[sum(s[i : i + regime.draws]) / regime.draws for i in range(0, len(s), regime.draws)] for s in series]
    entries = [
        {"tactic": list(t.values()), "rounds_us": [round(us, 2) for us in rounds_us]}
        for t, rounds_us in zip(final, by_round, strict=True)
    ]
    return {
        "rows": rows,
        "model": layer.name,
        "regime": regime.model_dump(mode="json"),
        "environment": environment(backend, _DEVICE).model_dump(mode="json"),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "default": list(default.values()),
        "default_us": stats.median(by_round[final.index(default)]),
        "noise": abs(stats.median(by_round[0]) / stats.median(by_round[-1]) - 1),
        "hopeless": hopeless,
        "single_us": [[*tactic.values(), round(us, 2)] for tactic, us in single.items()],
        "finalists": entries[:-1],
        "again_us": entries[-1]["rounds_us"],
        "failures": [[*tactic.values(), reason] for tactic, reason in failures.items()],
    }


def time_once(call: TimedCall) -> float:
    """Returns the time in µs of one warm run on draw 0, launch overhead included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call(0)
    end.record()
    torch.cuda.synchronize()
    return float(1e3 * begin.elapsed_time(end))


def pack(journal: Path) -> dict[str, Any]:
    """Returns the journal as one table: a list of all configurations, and for each cell the times in its order.

    A cell keeps its own environment, because a journal may continue after the kernel's source changed.
    """
    cells = [json.loads(line) for line in journal.read_text().splitlines()]
    configs = sorted({tuple(row[:6]) for cell in cells for row in cell["single_us"]})
    number = {config: index for index, config in enumerate(configs)}
    packed = []
    for cell in cells:
        times = [None] * len(configs)
        for row in cell["single_us"]:
            times[number[tuple(row[:6])]] = row[6]
        packed.append(
            {
                **{key: cell[key] for key in ("load", "rows", "regime", "environment", "measured_at")},
                **{key: cell[key] for key in ("noise", "hopeless", "again_us")},
                "default": number[tuple(cell["default"])],
                "single_us": times,
                "finalists": {str(number[tuple(e["tactic"])]): e["rounds_us"] for e in cell["finalists"]},
                "failures": {" ".join(map(str, row[:6])): row[6] for row in cell["failures"]},
            }
        )
    return {
        "schema_version": 1,
        "model": cells[0]["model"],
        "names": list(space.VALUES),
        "configs": configs,
        "cells": packed,
    }


if __name__ == "__main__":
    main()
