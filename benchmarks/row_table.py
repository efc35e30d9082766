"""Times the choices of many buckets at many other row counts, to show how much slower they are between the buckets.

It tunes the keys of vLLM's files and one bucket between each two of them. Then it times three kinds of tactics: every
choice, vLLM's default for every row count, and every row of the file that vLLM ships for the layer. They are timed
interleaved, at all these row counts and at random ones, on draws that no tune has used. One journal line is one
deployment.

    PYTHONPATH=.:ENGINE_FOLDER python benchmarks/row_table.py OUT.jsonl --kernel vllm --configs CONFIGS
    python benchmarks/row_table.py OUT.jsonl --report

ENGINE_FOLDER has the engine's package; its Python sources are enough. CONFIGS is vLLM's folder of configuration files.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import LOADS, Journal

import moetune
from moetune.backends.base import Problem
from moetune.backends.registry import backend as backend_of
from moetune.measure.bench import Bench
from moetune.measure.compiling import Compilers, capability_of
from moetune.spec.ladder import VLLM_BUCKETS
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

DEPLOYMENTS = tuple(
    (model, ep, load)
    for model, ep in (("qwen3-235b-a22b", 8), ("deepseek-r1", 8), ("minimax-m2.5", 8), ("qwen3-coder-480b-a35b", 16))
    for load in ("allgather", "deduplicated")
)
LARGEST_ROWS = 6144
NUM_RANDOM_ROWS = 46
FIRST_DRAW, NUM_DRAWS = 200, 16
"""No tune uses draws from this number on."""


def tuned_rows() -> list[int]:
    """Returns the keys of vLLM's files, the geometric mean of each two neighbors, and one row count above the last."""
    middles = (round((low * high) ** 0.5) for low, high in pairwise(VLLM_BUCKETS))
    return sorted({*VLLM_BUCKETS, *middles, LARGEST_ROWS})


def shipped_rows(layer: MoELayer, regime: Regime, configs: Path | None) -> dict[int, Tactic]:
    """Returns the rows of the file that vLLM ships for this layer on an H200; none if there is no such file."""
    shard = regime.shard(layer)
    kind = ",dtype=fp8_w8a8,block_shape=[128,128]" if layer.precision == "fp8_block" else ""
    name = f"E={shard.num_local},N={regime.intermediate_size(layer)},device_name=NVIDIA_H200{kind}.json"
    if configs is None or not (configs / name).is_file():
        return {}
    read = json.loads((configs / name).read_text())
    return {
        int(key): Tactic({name: value for name, value in row.items() if name != "SPLIT_K"})
        for key, row in read.items()
        if key.isdigit()
    }


def measured(model: str, ep: int, load: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the line of one deployment: its tactics, which row count uses which of them, and mean times in µs."""
    layer = moetune.layer(model)
    keys = tuned_rows()
    regime = Regime(ep_size=ep, attention_dp=True, **LOADS[load], ladder=",".join(map(str, keys)))
    backend = backend_of("triton", kernel=options.kernel)
    profile = moetune.tune(layer, regime, backend, options.store, time_budget_s=options.seconds)
    generator = random.Random(1)
    others = {round(2 ** generator.uniform(0, 13)) for _ in range(NUM_RANDOM_ROWS)}
    all_rows = sorted({*keys, *others})
    choices = {choice.rows: choice.tactic for choice in profile.choices}
    defaults = {rows: backend.default(layer, regime, rows) for rows in all_rows}
    shipped = shipped_rows(layer, regime, options.configs)
    tactics = list(dict.fromkeys((*choices.values(), *defaults.values(), *shipped.values())))
    times_us, again_us = {}, {}
    with Compilers(backend, capability_of("cuda")) as compilers:
        for rows in all_rows:
            draws = as_draws(realize(layer, regime, rows, None, FIRST_DRAW + draw) for draw in range(NUM_DRAWS))
            failed = compilers.wait(layer, regime, rows, tactics, ())
            runnable = [tactic for tactic in tactics if tactic not in failed]
            bench = Bench(backend, Problem(layer, regime, rows, regime.shard(layer), draws, "cuda"))
            again, *series = bench.samples([defaults[rows], *runnable], list(range(NUM_DRAWS)) * 2)
            again_us[rows] = fmean(again) if again else None
            pairs = zip(runnable, series, strict=True)
            times_us[rows] = {tactics.index(tactic): round(fmean(of_one), 2) for tactic, of_one in pairs if of_one}
            del bench
            torch.cuda.empty_cache()

    def by_index(chosen: Mapping[int, Tactic]) -> dict[int, int]:
        return {rows: tactics.index(tactic) for rows, tactic in chosen.items()}

    return {
        "model": model,
        "ep": ep,
        "load": load,
        "kernel": options.kernel,
        "device": torch.cuda.get_device_name(),
        "measured_at": time.strftime("%Y-%m-%d"),
        "tactics": [dict(tactic) for tactic in tactics],
        "choices": by_index(choices),
        "defaults": by_index(defaults),
        "shipped": by_index(shipped),
        "default_again_us": again_us,
        "times_us": times_us,
    }


def nearest(keys: Sequence[int], rows: int) -> int:
    """Returns the key to which vLLM maps `rows`."""
    return min(keys, key=lambda key: abs(key - rows))


def report(line: Mapping[str, Any]) -> str:
    """Returns a line of Markdown with the times of other tactics over the choice's time, geometric mean and least.

    The row counts are those that are no key of vLLM's files.
    """
    choices, defaults, shipped = (
        {int(r): at for r, at in line[name].items()} for name in ("choices", "defaults", "shipped")
    )
    keys = [rows for rows in choices if rows in VLLM_BUCKETS]
    cells = []
    for wanted in (keys, list(choices)):
        gains: dict[str, list[float]] = {"default": [], "shipped": [], "best": []}
        for rows, times in line["times_us"].items():
            rows, times_us = int(rows), {int(at): us for at, us in times.items()}
            if rows in VLLM_BUCKETS:
                continue
            chosen_us = times_us[choices[nearest(wanted, rows)]]
            gains["default"].append(times_us[defaults[rows]] / chosen_us)
            gains["best"].append(min(times_us.values()) / chosen_us)
            if shipped:
                gains["shipped"].append(times_us[shipped[nearest(list(shipped), rows)]] / chosen_us)
        cells += [f"{geomean(ratios):.3f} / {min(ratios):.3f}" if ratios else "–" for ratios in gains.values()]
    return f"| {line['model']} | {line['ep']} | {line['load']} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--kernel", choices=("builtin", "vllm", "sglang"), default="builtin")
    parser.add_argument("--configs", type=Path, help="the folder of vLLM's own configuration files")
    parser.add_argument("--store", type=Path, default=Path(".row-table-store"))
    parser.add_argument("--seconds", type=float, default=100.0, help="the time budget of each tune")
    parser.add_argument("--report", action="store_true", help="print the journal as a table; measure nothing")
    options = parser.parse_args()
    journal = Journal(options.journal)
    for model, ep, load in () if options.report else DEPLOYMENTS:
        if journal.find(model=model, ep=ep, load=load, kernel=options.kernel) is None:
            journal.add(**measured(model, ep, load, options))
    print("| layer | EP | load | 18 keys: default | shipped | best known | 36 keys: default | shipped | best known |")
    print("|---|---|---|---|---|---|---|---|---|")
    for line in journal.lines:
        print(report(line))


if __name__ == "__main__":
    main()
