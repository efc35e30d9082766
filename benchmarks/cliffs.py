"""Finds the FlashInfer tactics that have a cliff when one expert gets busy, and the tuners that choose them.

    PYTHONPATH=. python benchmarks/cliffs.py OUT.jsonl [--model qwen3-235b-a22b] [--ep 32] [--dispatch deduplicated]
        [--rows 128,256,512] [--seconds 550]

Each tactic of each GEMM is timed with one tactic of the other GEMM that is fast at all loads. The busiest expert has
1 … 4 times its load. A tactic's slowdown is its time over the best tactic's time at the same load. It has a cliff if
its slowdown at one load is more than twice that at another, of any row count. A tuner's choice is over a cliff if it
has a cliff and is more than twice as slow as the best at one of the loads. OUT is a journal: the same command continues
where it stopped. Exits 1 if moetune's choice is over a cliff.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common import Journal
from flashinfer_autotune import regime_of
from flashinfer_common import (
    bf16_layer,
    ids,
    searched,
    tactics_us,
    unseen_problem,
    warm_flashinfer,
)

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend
from moetune.dep_bench.flashinfer_choice import own_autotune, own_pick
from moetune.search.coordinate import coordinate
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize, stress

FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)
CLIFF = 2.0
GEMMS = ("gemm1", "gemm2")


def slowdowns(us: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Returns each tactic's time over the best tactic's, at each load.

    Args:
        us: the times of each tactic, one for each of `FACTORS`.
    """
    best = [min(column) for column in zip(*us.values(), strict=True)]
    return {tactic: [time / least for time, least in zip(times, best, strict=True)] for tactic, times in us.items()}


def cliffs(lines: Sequence[Mapping[str, Any]], gemm: str) -> dict[str, float]:
    """Returns the tactics that have a cliff over all lines, with their largest slowdown."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for tactic, factors in slowdowns(line["us"][gemm]).items():
            found.setdefault(tactic, []).extend(factors)
    return {tactic: round(max(ratios), 2) for tactic, ratios in found.items() if max(ratios) > CLIFF * min(ratios)}


def measure(layer: MoELayer, regime: Regime, rows: int) -> dict[str, Any]:
    """Returns every tactic's time at each load, and the choices of FlashInfer and of moetune."""
    from moetune.tuning.tune import tune

    backend = _backend()
    routing = realize(layer, regime, rows)
    draws = tuple(stress(layer, regime, routing, 0, factor) for factor in FACTORS)
    runner = backend.prepare(Problem(layer, regime, rows, regime.shard(layer), as_draws(draws), "cuda"))
    tactics = backend.candidates(layer, regime, rows, "cuda").tactics[1:]
    last = len(FACTORS) - 1
    robust = searched(coordinate(tactics, rounds=(1, 1, 1)), runner, (last,))[0]
    us: dict[str, dict[str, list[float]]] = {}
    for name, other in (GEMMS, GEMMS[::-1]):
        line = [tactic for tactic in tactics if tactic[other] == robust[other]]
        columns = [tactics_us(runner, line, (draw,), 3) for draw in range(len(FACTORS))]
        us[name] = {str(t[name]): list(times) for t, times in zip(line, zip(*columns, strict=True), strict=True)}
    with tempfile.TemporaryDirectory() as store:
        one = regime.model_copy(update={"ladder": type(regime.ladder).parse([rows])})
        chosen = tune(layer, one, "flashinfer-cutlass", store).choices[0].tactic
    own = own_pick(runner)
    busiest = [int(draw.load.max()) for draw in draws]
    return {"fixed": ids(robust), "us": us, "own": ids(own), "moetune": ids(chosen), "busiest": busiest}


def fallen(line: Mapping[str, Any], tuner: str, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns a tuner's choices in one line that are over a cliff, with their largest slowdown in this line.

    Args:
        line: one row count.
        tuner: `own` (FlashInfer) or `moetune`.
        found: the tactics with a cliff, for each GEMM.
    """
    picked = dict(zip(GEMMS, map(str, line[tuner]), strict=True))
    at_worst = {gemm: max(slowdowns(line["us"][gemm]).get(tactic, [0.0])) for gemm, tactic in picked.items()}
    return {
        f"{gemm} {tactic}": round(at_worst[gemm], 2)
        for gemm, tactic in picked.items()
        if tactic in found[gemm] and at_worst[gemm] > CLIFF
    }


@cache
def _backend() -> FlashInferCutlassBackend:
    return FlashInferCutlassBackend()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen3-235b-a22b")
    parser.add_argument("--ep", type=int, default=32)
    parser.add_argument("--dispatch", default="deduplicated")
    parser.add_argument("--rows", default="128,256,512")
    parser.add_argument("--seconds", type=float, default=550.0, help="start no row count after this many seconds")
    options = parser.parse_args()
    begin, journal, layer = time.perf_counter(), Journal(options.out), bf16_layer(options.model)
    regime = regime_of(layer, options.ep, options.dispatch)
    key = {"model": options.model, "ep": options.ep, "dispatch": options.dispatch}
    for rows in map(int, options.rows.split(",")):
        if journal.find(**key, rows=rows) is None and time.perf_counter() - begin < options.seconds:
            if not _own.cache_info().currsize:
                warm_flashinfer()
            _own(layer, regime)
            journal.add(**key, rows=rows, **measure(layer, regime, rows))
    lines = [line for line in journal.lines if key.items() <= line.items()]
    found = {gemm: cliffs(lines, gemm) for gemm in GEMMS}
    print(f"tactics with a cliff, and their largest time over the best tactic's: {found}")
    for line in lines:
        picks = {one: (line[one], fallen(line, one, found) or "none over a cliff") for one in ("own", "moetune")}
        print(f"{line['rows']} rows, busiest expert {line['busiest']}: FlashInfer chose {picks['own'][0]}, "
              f"{picks['own'][1]}; moetune {picks['moetune'][0]}, {picks['moetune'][1]}", flush=True)  # fmt: skip
    return int(not lines or any(fallen(line, "moetune", found) for line in lines))


@cache
def _own(layer: MoELayer, regime: Regime) -> float:
    return own_autotune(_backend().prepare(unseen_problem(layer, regime, max(regime.buckets), 1)))


if __name__ == "__main__":
    sys.exit(main())
