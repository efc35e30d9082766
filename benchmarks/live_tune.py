"""Runs `moetune tune` of the Triton backend with an empty Triton cache, and measures how good its choices are.

Every choice for a cell of a recorded table is timed again, interleaved with the best configurations of this table,
which has all of them. The ratio of the two times, minus one, is the regret of the search.

    python benchmarks/live_tune.py --table tests/data/grouped_triton-qwen3-235b-a22b-ep8-h200.json --out live.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from common import series_us

from moetune import stats
from moetune.spec.tactic import Tactic
from moetune.store.profile import Profile

OPTIONS = {
    "packed": ["--dp"],
    "deduplicated": ["--dispatch", "vllm:deepep_high_throughput"],
    "allgather": ["--dispatch", "vllm:allgather_reducescatter"],
}
RIVALS = 4
"""The number of the table's best re-measured configurations that each choice is compared with."""
SAMPLES = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-235b-a22b")
    parser.add_argument("--ep", default="8")
    parser.add_argument("--loads", default="packed,deduplicated")
    parser.add_argument("--max", default="8192", help="tune_max_num_tokens")
    parser.add_argument("--ladder", default="hybrid")
    parser.add_argument("--table", type=Path, help="a recorded table of the same layer and ep")
    parser.add_argument("--store", type=Path, default=Path("live-store"))
    parser.add_argument("--out", type=Path, default=Path("live.json"))
    options = parser.parse_args()
    results = []
    for load in options.loads.split(","):
        results.append(result := tune(options, load))
        print(report(result), flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        if options.table:
            result["against_exhaustive"] = against_exhaustive(options.table, load, Path(result["profile"]))
            print(verdict(result["against_exhaustive"]), flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


def tune(options: argparse.Namespace, load: str) -> dict[str, Any]:
    """Tunes once in a new process, with an empty Triton cache."""
    question = ["--model", options.model, "--ep", options.ep, *OPTIONS[load], "--ladder", options.ladder]
    arguments = ["tune", *question, "--tune-max-num-tokens", options.max, "--backend", "triton", "--again"]
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "moetune", *arguments, "--store", str(options.store), "--json"],
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            check=True,
        )
        wall_s = time.perf_counter() - begin
    document = json.loads(done.stdout)
    buckets = [
        {key: choice[key] for key in ("rows", "tactic", "time_us", "default_time_us", "gain", "gain_low", "noise")}
        | {"tried": choice["tried"], "failed": len(choice["rejected"])}
        for choice in document["choices"]
    ]
    return {
        "load": load,
        "command": "moetune " + " ".join(arguments),
        "cores": len(os.sched_getaffinity(0)),
        "wall_s": round(wall_s, 1),
        "gain_geomean": stats.geomean([bucket["gain"] for bucket in buckets]),
        "gain_least": min(bucket["gain"] for bucket in buckets),
        "environment": document["environment"],
        "profile": document["path"],
        "buckets": buckets,
    }


def against_exhaustive(table_path: Path, load: str, profile_path: Path) -> list[dict[str, Any]]:
    """Compares each choice that the table covers with the exhaustive winners, on draws that no search used."""
    from moetune.backends.base import Problem
    from moetune.backends.registry import backend as backend_of
    from moetune.workload.draws import as_draws, untouched
    from moetune.workload.routing import realize

    table, profile = json.loads(table_path.read_text()), Profile.model_validate_json(profile_path.read_text())
    tactics = [Tactic(dict(zip(table["names"], values, strict=True))) for values in table["configs"]]
    chosen = {choice.rows: choice.tactic for choice in profile.choices}
    layer, regime = profile.layer, profile.regime
    backend, judged = backend_of("triton"), []
    for cell in table["cells"]:
        if cell["load"] != load or cell["rows"] not in chosen:
            continue
        rows = cell["rows"]
        ranked = sorted(cell["finalists"], key=lambda number: stats.median(cell["finalists"][number]))
        rivals = [tactics[int(number)] for number in ranked[:RIVALS]]
        draws = untouched(regime.draws)
        routings = tuple(realize(layer, regime, rows, draw=draw) for draw in draws)
        runner = backend.prepare(Problem(layer, regime, rows, regime.shard(layer), as_draws(routings), "cuda"))
        calls = [partial(runner.run, tactic) for tactic in dict.fromkeys((chosen[rows], *rivals))]
        turns = [turn % len(routings) for turn in range(SAMPLES if rows < 4096 else 2 * len(routings))]
        means = [fmean(series) for series in series_us(calls, turns)]
        judged.append({"rows": rows, "ratio": means[0] / min(means), "chosen_us": means[0], "best_us": min(means)})
    return judged


def report(result: dict[str, Any]) -> str:
    """Returns the tune as Markdown."""
    lines = [
        f"\n`{result['command']}`: {result['wall_s']} s wall, {result['cores']} cores, "
        f"{len(result['buckets'])} buckets; against the default geomean {result['gain_geomean']:.3f}×, "
        f"least {result['gain_least']:.3f}×\n",
        "| rows | µs | default µs | gain | tried | failed | A/A |\n|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {b['rows']} | {b['time_us']:.1f} | {b['default_time_us']:.1f} | {b['gain']:.3f} | {b['tried']}"
        f" | {b['failed']} | {b['noise']:.1%} |"
        for b in result["buckets"]
    ]
    return "\n".join(lines)


def verdict(judged: list[dict[str, Any]]) -> str:
    """Returns the comparison with the exhaustive winners as one line."""
    if not judged:
        return "The table holds none of these cells."
    cells = ", ".join(f"{cell['rows']}: {cell['ratio']:.4f}" for cell in judged)
    ratios = [cell["ratio"] for cell in judged]
    return f"chosen / exhaustive best: geomean {stats.geomean(ratios):.4f}, worst {max(ratios):.4f} ({cells})"


if __name__ == "__main__":
    main()
