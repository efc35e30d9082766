"""Checks the numerics of the Triton grouped GEMM on a GPU, and times how long it takes to compile and to run.

    PYTHONPATH=. python benchmarks/gpu_numerics.py OUT.json [--workers 14] [--quick]

All errors are relative Frobenius errors, over several regimes and row counts:

    fp32     of every draw against an fp32 reference, at most 1e-2 in bf16 and 8e-2 in fp8
    staged   of each stage of every draw against a reference with the kernel's own roundings, at most 1e-2
    rounded  of the whole layer against such a reference, over several draws with at least 16 rows, at most 1e-2
             (see `triton_numerics.errors_of_stages`)

The replay of a CUDA graph is also compared with the eager run (at most 1e-3). Exits 1 if an error is larger.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton_numerics import compile_tactic, rounded_reference, staged_errors

from moetune.backends.base import Problem
from moetune.backends.grouped_triton import space
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.reference import relative_error
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

ROWS = (1, 3, 16, 257, 4096)
DRAWS, LEAST_ROWS = 2, 16
"""The least number of draws of a bucket, and of the rows of all its draws: see `triton_numerics.errors_of_stages`."""
ROUNDED_TOLERANCE = 1e-2
LAYERS = ("qwen3-235b-a22b", "deepseek-r1")
REGIMES = {
    "none": Regime(ep_size=8),
    "allgather": Regime(ep_size=8, dispatch="allgather"),
    "packed": Regime(ep_size=8, attention_dp=True),
    "packed, L < k": Regime(ep_size=64, attention_dp=True),
    "deduplicated": Regime(ep_size=8, layout="deduplicated"),
    "slot": Regime(ep_size=8, layout="slot"),
    "pool": Regime(ep_size=8, layout="pool"),
    "none, tp 2": Regime(ep_size=4, tp_size=2),
}


def tactic(*values: int) -> Tactic:
    return Tactic(dict(zip(space.VALUES, values, strict=True)))


NUMERICS_TACTICS = (tactic(16, 64, 128, 1, 4, 3), tactic(32, 32, 64, 32, 4, 5), tactic(128, 128, 64, 16, 8, 3))
TIMED_TACTICS = (
    tactic(16, 64, 128, 1, 4, 4),
    tactic(16, 128, 128, 1, 4, 4),
    tactic(16, 128, 64, 16, 8, 5),
    tactic(32, 64, 128, 1, 4, 3),
    tactic(32, 128, 128, 1, 4, 4),
    tactic(32, 256, 64, 1, 8, 4),
    tactic(64, 64, 128, 1, 4, 4),
    tactic(64, 128, 128, 1, 4, 3),
    tactic(64, 128, 64, 16, 8, 4),
    tactic(64, 256, 64, 16, 8, 3),
    tactic(128, 64, 64, 1, 4, 4),
    tactic(128, 128, 64, 16, 8, 4),
    tactic(128, 256, 64, 16, 8, 3),
    tactic(256, 64, 64, 1, 8, 4),
)


def problem_of(layer: MoELayer, regime: Regime, rows: int, draws: int) -> Problem:
    """Returns the problem of the last rank, so that ids do not start at 0."""
    rank = regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), "cuda")


def captured(call: Callable[[int], object], draws: Sequence[int]) -> torch.cuda.CUDAGraph:
    """Returns a CUDA graph that runs `call` on each of `draws`, captured after one eager run."""
    call(draws[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for draw in draws:
            call(draw)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Replays the graph once and returns the time of one call in µs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(1e3 * begin.elapsed_time(end) / calls)


def interleaved_us(calls: Sequence[Callable[[int], object]], draws: Sequence[int], rounds: int = 7) -> list[float]:
    """Returns the median time of each call in µs.

    Each round replays all calls in turn, and every second round in reverse order.
    """
    graphs = [captured(call, draws) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for position in list(range(len(graphs)))[:: -1 if turn % 2 else 1]:
            sample = replay_us(graphs[position], len(draws))
            if turn:
                samples[position].append(sample)
    return [statistics.median(of_call) for of_call in samples]


def numerics(name: str, label: str, rows: int, remote: str) -> list[dict[str, Any]]:
    """Returns the errors of some tactics on one bucket."""
    layer, regime, backend = preset(name), REGIMES[label], TritonBackend(remote=remote)  # type: ignore[arg-type]
    if regime.layout == "pool":
        rows = -(-rows // regime.ep_size) * regime.ep_size
    draws = range(max(DRAWS, -(-LEAST_ROWS // rows)))
    runner = backend.prepare(problem_of(layer, regime, rows, len(draws)))
    exact = [runner.reference(draw) for draw in draws]
    rounded = torch.cat([rounded_reference(runner, draw) for draw in draws])
    results = []
    for candidate in dict.fromkeys((backend.default(layer, regime, rows), *NUMERICS_TACTICS)):
        eager = [runner.run(candidate, draw).clone() for draw in draws]
        graph = captured(lambda which: runner.run(candidate, which), draws[-1:])  # noqa: B023
        out = runner.run(candidate, 0)
        graph.replay()
        torch.cuda.synchronize()
        result: dict[str, Any] = {
            "layer": name,
            "regime": label,
            "rows": rows,
            "remote": remote,
            "tactic": dict(candidate),
            "draws": len(draws),
            "error_fp32": max(map(relative_error, eager, exact)),
            "error_rounded": relative_error(torch.cat(eager), rounded),
            "replay_difference": relative_error(out, eager[-1].float()),
            "error_staged": max(max(staged_errors(runner, candidate, draw)) for draw in draws),
        }
        result["ok"] = bool(
            result["error_fp32"] <= backend.tolerance(layer)
            and max(result["error_rounded"], result["error_staged"]) <= ROUNDED_TOLERANCE
            and result["replay_difference"] <= 1e-3
        )
        results.append(result)
    return results


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Returns one line about the results of one bucket."""
    first = results[0]
    worst = {key: max(result[key] for result in results) for key in ("error_fp32", "error_rounded", "error_staged")}
    verdict = "ok" if all(result["ok"] for result in results) else "WRONG"
    return (
        f"{first['layer']:16} {first['regime']:14} M={first['rows']:<5} {first['remote']:5} "
        f"fp32 {worst['error_fp32']:.1e}  rounded {worst['error_rounded']:.1e}  "
        f"staged {worst['error_staged']:.1e}  {verdict}"
    )


def timings(name: str, rows: int, label: str, workers: int) -> dict[str, Any]:
    """Returns compile times, ahead of the first run and in it, and run times in µs of some tactics on one bucket."""
    layer, regime, backend = preset(name), REGIMES[label], TritonBackend()
    shapes = space.Shapes.of(layer, regime, rows)
    found = backend.candidates(layer, regime, rows, "cuda")
    default = backend.default(layer, regime, rows)
    chosen = [
        default,
        *(candidate for candidate in TIMED_TACTICS if candidate in found.tactics and candidate != default),
    ]
    capability = torch.cuda.get_device_capability()

    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(compile_tactic, shapes, candidate, capability=capability) for candidate in chosen]
        usages = [future.result() for future in pending]
    ahead_s = time.perf_counter() - begin

    begin = time.perf_counter()
    runner = backend.prepare(problem_of(layer, regime, rows, 4))
    torch.cuda.synchronize()
    prepare_s = time.perf_counter() - begin
    first_run_s = []
    for candidate in chosen:
        begin = time.perf_counter()
        runner.run(candidate)
        torch.cuda.synchronize()
        first_run_s.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    times_us = interleaved_us([partial(runner.run, candidate) for candidate in chosen], range(4))
    timing_s = time.perf_counter() - begin
    ids = runner._topk_ids
    alignment_us = interleaved_us([lambda draw: runner._align(ids[draw], 64)], range(4))[0]
    return {
        "layer": name,
        "regime": label,
        "rows": rows,
        "candidates": len(found.tactics),
        "excluded": len(found.excluded),
        "compile_ahead_s": ahead_s,
        "prepare_s": prepare_s,
        "timing_s": timing_s,
        "alignment_us": alignment_us,
        "tactics": [
            {"tactic": dict(candidate), "time_us": us, "first_run_s": first, **usage}
            for candidate, us, first, usage in zip(chosen, times_us, first_run_s, usages, strict=True)
        ],
    }


def print_timings(timed: dict[str, Any]) -> None:
    print(
        f"\n{timed['layer']} {timed['regime']} M={timed['rows']}: {timed['candidates']} candidates, "
        f"{timed['excluded']} excluded; {len(timed['tactics'])} tactics "
        f"compiled ahead in {timed['compile_ahead_s']:.1f} s, prepared in {timed['prepare_s']:.1f} s, "
        f"timed in {timed['timing_s']:.1f} s; alignment {timed['alignment_us']:.1f} µs"
    )
    for entry in timed["tactics"]:
        print(
            f"  {Tactic(entry['tactic'])!s:104} {entry['time_us']:9.1f} µs  "
            f"first run {1e3 * entry['first_run_s']:6.0f} ms  "
            f"{entry['registers']} registers, {entry['spill_bytes']} spilled, {entry['shared_bytes']} shared",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--no-timings", action="store_true", help="check the numerics only")
    parser.add_argument("--quick", action="store_true", help="check fewer row counts")
    options = parser.parse_args()

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "environment": TritonBackend().environment(),
        "limits": repr(space.Limits.of("cuda")),
        "numerics": [],
        "timings": [],
        "failures": [],
    }
    print(report["device"], report["torch"], report["triton"], report["limits"], flush=True)
    begin = time.perf_counter()
    layers = options.layers.split(",")
    for name in layers:
        for label in REGIMES:
            for rows in (3, 257) if options.quick else ROWS:
                for remote in ("drop", "zero") if rows == 257 else ("drop",):
                    try:
                        results = numerics(name, label, rows, remote)
                        report["numerics"] += results
                        print(summary(results), flush=True)
                    except Exception as error:  # the other buckets are still checked
                        where = f"{name} {label} M={rows} {remote}"
                        report["failures"].append(f"{where}: {type(error).__name__}: {error}")
                        print(where, "FAILED", type(error).__name__, error, flush=True)
    report["numerics_s"] = time.perf_counter() - begin
    for name in () if options.no_timings else layers:
        for rows, label in ((256, "packed"), (256, "allgather"), (4096, "packed")):
            try:
                timed = timings(name, rows, label, options.workers)
                report["timings"].append(timed)
                print_timings(timed)
            except Exception as error:
                report["failures"].append(f"timings {name} {label} M={rows}: {type(error).__name__}: {error}")
                print(report["failures"][-1], flush=True)
    options.out.write_text(json.dumps(report, indent=1))
    wrong = [result for result in report["numerics"] if not result["ok"]]
    print(
        f"\n{len(report['numerics'])} results, {len(wrong)} wrong, {len(report['failures'])} failures, "
        f"numerics in {report['numerics_s']:.0f} s"
    )
    return 1 if wrong or report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
