"""Which of FlashInfer's tactics fall off a cliff when one expert gets busy, and who picks them.

    PYTHONPATH=. python benchmarks/cliffs.py OUT.jsonl [--model qwen3-235b-a22b] [--ep 32] [--dispatch deduplicated]
        [--rows 128,256,512] [--seconds 550]

Each tactic of each GEMM is timed beside one of the other that is fast at all loads, with the busiest expert at 1 … 4
times its load. A cliff: at some load the tactic slows by more than twice what the best of that load slows. OUT is a
journal: the same command goes on where it stopped. Exits 1 where moetune's choice has a cliff.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flashinfer_autotune import regime_of
from flashinfer_common import (
    Journal,
    bf16_layer,
    ids,
    means_us,
    own_autotune,
    own_pick,
    searched,
    unseen_problem,
    warm_flashinfer,
)

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass import FlashInferCutlassBackend
from moetune.search.coordinate import coordinate
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.routing import realize, stress

FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)
CLIFF = 2.0


def cliffs(us: Mapping[str, list[float]]) -> dict[str, float]:
    """By tactic, how many times more than the best of each load it slows from the first load on: those past `CLIFF`.

    Args:
        us: times by tactic, one for each of `FACTORS`.
    """
    best = [min(column) for column in zip(*us.values(), strict=True)]
    slowed = {
        tactic: max((time / times[0]) / (top / best[0]) for time, top in zip(times, best, strict=True))
        for tactic, times in us.items()
    }
    return {tactic: round(factor, 2) for tactic, factor in slowed.items() if factor > CLIFF}


def measure(layer: MoELayer, regime: Regime, rows: int) -> dict[str, Any]:
    """Every tactic's time at each load, and the picks of FlashInfer and of moetune."""
    from moetune.tune import tune

    backend = _backend()
    routing = realize(layer, regime, rows)
    draws = tuple(stress(layer, regime, routing, 0, factor) for factor in FACTORS)
    runner = backend.prepare(Problem(layer, regime, rows, regime.shard(layer), draws, "cuda"))
    tactics = backend.candidates(layer, regime, rows, "cuda").tactics[1:]
    last = len(FACTORS) - 1
    robust = searched(coordinate(tactics, rounds=(1, 1, 1)), runner, (last,))[0]
    us: dict[str, dict[str, list[float]]] = {}
    for name, other in (("gemm1", "gemm2"), ("gemm2", "gemm1")):
        line = [tactic for tactic in tactics if tactic[other] == robust[other]]
        columns = [means_us(runner, line, (draw,), 3) for draw in range(len(FACTORS))]
        us[name] = {str(t[name]): list(times) for t, times in zip(line, zip(*columns, strict=True), strict=True)}
    with tempfile.TemporaryDirectory() as store:
        one = regime.model_copy(update={"ladder": type(regime.ladder).parse([rows])})
        chosen = tune(layer, one, "flashinfer-cutlass", store).choices[0].tactic
    own = own_pick(runner)
    busiest = [int(draw.load.max()) for draw in draws]
    return {"fixed": ids(robust), "us": us, "own": ids(own), "moetune": ids(chosen), "busiest": busiest}


def verdict(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The cliffs of both GEMMs' tactics, and those that each tuner picked."""
    found = {name: cliffs(line["us"][name]) for name in ("gemm1", "gemm2")}
    picked = {
        who: {
            f"{name} {tactic}": found[name][str(tactic)]
            for name, tactic in zip(("gemm1", "gemm2"), line[who], strict=True)
            if str(tactic) in found[name]
        }
        for who in ("own", "moetune")
    }
    return {**found, **picked}


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
    parser.add_argument("--seconds", type=float, default=550.0, help="no row count is begun after this long")
    options = parser.parse_args()
    begin, journal, layer = time.perf_counter(), Journal(options.out), bf16_layer(options.model)
    regime = regime_of(layer, options.ep, options.dispatch)
    key = {"model": options.model, "ep": options.ep, "dispatch": options.dispatch}
    worst = 0
    for rows in map(int, options.rows.split(",")):
        line = journal.find(**key, rows=rows)
        if line is None:
            if time.perf_counter() - begin > options.seconds:
                break
            if not _own.cache_info().currsize:
                warm_flashinfer()
            _own(layer, regime)
            line = journal.add(**key, rows=rows, **measure(layer, regime, rows))
        found = verdict(line)
        print(f"{rows} rows, busiest expert {line['busiest']}: cliffs of gemm1 {found['gemm1']}, of gemm2 "
              f"{found['gemm2']}; FlashInfer picked {line['own']}, of them {found['own'] or 'none'}; moetune "
              f"{line['moetune']}, of them {found['moetune'] or 'none'}", flush=True)  # fmt: skip
        worst += len(found["moetune"])
    return int(worst > 0)


@cache
def _own(layer: MoELayer, regime: Regime) -> float:
    return own_autotune(_backend().prepare(unseen_problem(layer, regime, max(regime.buckets), 1)))


if __name__ == "__main__":
    sys.exit(main())
