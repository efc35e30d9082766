"""Compares the builtin grouped GEMM with vLLM's or SGLang's own kernel, interleaved on the same loads.

    PYTHONPATH=.:ENGINE_FOLDER python benchmarks/kernel_parity.py OUT.json [--kernel vllm] [--workers 14]

ENGINE_FOLDER has the engine's package; its Python sources are enough. Both kernels run the same tactics, and all other
steps of the layer are the same too. The best tactic of each kernel is then timed again. The builtin's best is timed
twice, which gives the A/A noise. Exits 1 if the builtin's best is more than 3 % slower.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_numerics import interleaved_us, problem_of, tactic
from triton_numerics import compile_tactic

from moetune.backends.grouped_triton import space
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.defaults import default_config
from moetune.backends.grouped_triton.kernel_versions import Remote
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

LOADS = (("packed", 16), ("packed", 256), ("packed", 4096), ("none", 256))
REGIMES = {"packed": Regime(ep_size=8, attention_dp=True), "none": Regime(ep_size=8)}
LAYERS = ("qwen3-235b-a22b", "deepseek-r1")
DRAWS = range(4)
WITHIN = 0.03


def good_tactics(shapes: space.Shapes, legal: tuple[Tactic, ...]) -> list[Tactic]:
    """Returns the default and about thirty tactics with tiles near the number of rows of an expert."""
    rows_an_expert = shapes.num_slots / shapes.num_local
    block_m = next((size for size in space.VALUES["BLOCK_SIZE_M"] if size >= rows_an_expert), 128)
    sizes = sorted({max(16, min(128, block_m // 2)), min(128, block_m)})
    wanted = [
        tactic(m, n, k, group, 8 if m * n >= 128 * 128 else 4, stages)
        for m, n, k, group, stages in product(sizes, (64, 128), (64, 128), (1, 16), (3, 4))
    ]
    default = default_config(shapes.rows, shapes.num_local, shapes.fp8)
    return [default, *(candidate for candidate in wanted if candidate in set(legal) and candidate != default)]


def compare(name: str, label: str, rows: int, kernel: str, workers: int) -> dict[str, Any]:
    """Returns the times of both kernels on one load."""
    layer, regime = preset(name), REGIMES[label]
    remote: Remote = "zero" if kernel == "sglang" else "drop"
    backends = {which: TritonBackend(which, remote) for which in ("builtin", kernel)}
    shapes = space.Shapes.of(layer, regime, rows)
    tactics = good_tactics(shapes, backends[kernel].candidates(layer, regime, rows, "cuda").tactics)
    compile_one = partial(compile_tactic, capability=torch.cuda.get_device_capability(), zero_remote=remote == "zero")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(compile_one, shapes, each, kernel=which) for which in backends for each in tactics]
        for future in pending:
            future.result()

    problem = problem_of(layer, regime, rows, len(DRAWS))
    runners = {which: backend.prepare(problem) for which, backend in backends.items()}
    difference = runners["builtin"].run(tactics[0]).float() - runners[kernel].run(tactics[0]).float()
    relative = float(difference.norm() / runners["builtin"].run(tactics[0]).float().norm())

    def calls(which: str, chosen: list[Tactic]) -> list[Callable[[int], object]]:
        return [partial(runners[which].run, each) for each in chosen]

    both = interleaved_us([*calls("builtin", tactics), *calls(kernel, tactics)], DRAWS)
    times = {"builtin": both[: len(tactics)], kernel: both[len(tactics) :]}
    best = {which: tactics[us.index(min(us))] for which, us in times.items()}
    final = interleaved_us(
        [*calls("builtin", [best["builtin"]]), *calls(kernel, [best[kernel]]), *calls("builtin", [best["builtin"]])],
        DRAWS,
        rounds=31,
    )
    return {
        "layer": name,
        "regime": label,
        "rows": rows,
        "kernel": kernel,
        "tactics": len(tactics),
        "difference": relative,
        "best": {which: dict(chosen) for which, chosen in best.items()},
        "best_us": {"builtin": final[0], kernel: final[1]},
        "ratio": final[0] / final[1],
        "noise": abs(final[2] / final[0] - 1),
        "ratios": [mine / theirs for mine, theirs in zip(times["builtin"], times[kernel], strict=True)],
        "tactic_us": [
            {"tactic": dict(each), "builtin": mine, kernel: theirs}
            for each, mine, theirs in zip(tactics, times["builtin"], times[kernel], strict=True)
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernel", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--workers", type=int, default=14)
    options = parser.parse_args()
    if obstacle := TritonBackend(options.kernel).unavailable():
        print(f"{options.kernel}: {obstacle[0]} {obstacle[1]}", file=sys.stderr)
        return 2
    results = []
    for name, (label, rows) in product(options.layers.split(","), LOADS):
        result = compare(name, label, rows, options.kernel, options.workers)
        results.append(result)
        ratios = sorted(result["ratios"])
        print(
            f"{name:16} {label:7} M={rows:<5} best: builtin {result['best_us']['builtin']:8.1f} µs, "
            f"{options.kernel} {result['best_us'][options.kernel]:8.1f} µs, ratio {result['ratio']:.3f} "
            f"(noise {result['noise']:.3f}); the same tactic: {ratios[0]:.3f} … {ratios[len(ratios) // 2]:.3f} … "
            f"{ratios[-1]:.3f}; outputs differ by {result['difference']:.1e}",
            flush=True,
        )
    options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}, indent=1))
    return 1 if any(result["ratio"] > 1 + WITHIN for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
