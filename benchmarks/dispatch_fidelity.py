"""Measures which sampled routings fit which dispatcher: the regret, on traffic, of tactics that were tuned on them.

    PYTHONPATH=. python benchmarks/dispatch_fidelity.py OUT.jsonl [--seconds 550] [--summary]
        [--models …] [--ep …] [--kinds …] [--tokens …]

The traffic is simulated: each of ep ranks sends T tokens through the global router. One GPU stands for one rank and
gets the rows that the dispatch produces there, on draws that no tuner used. Five tactics for FlashInfer's bucket of
these rows are compared:

    own          the choice of FlashInfer's own autotune
    packed       moetune's choice for packed routings
    bucket_rows  moetune's choice for this dispatcher, with routings of the bucket's own rows only
    moetune      moetune's choice for this dispatcher, with the routings of `moetune tune` (`workload.draws.sampled`)
    best         the best known tactic, from a longer search on the traffic itself

OUT is a journal: the same command continues where it stopped. Exits 1 if moetune's regret exceeds 1 % in the geometric
mean of a dispatch or 3 % in a cell.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import LOADS, Journal
from flashinfer_common import (
    DRAWS,
    bf16_layer,
    ids,
    pair,
    searched,
    tactics_us,
    unseen_problem,
    warm_flashinfer,
)

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend
from moetune.dep_bench.flashinfer_choice import own_autotune, own_pick
from moetune.measure.bench import Bench
from moetune.measure.compiling import Compilers
from moetune.search.base import Search
from moetune.search.coordinate import coordinate
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean
from moetune.tuning.bucket import Bucket
from moetune.tuning.bucket_tuner import BucketTuner
from moetune.workload.dispatch import rows_for_tokens
from moetune.workload.distribution import seeded_generator
from moetune.workload.draws import as_draws, typical_rows
from moetune.workload.router import is_local, random_top_k
from moetune.workload.routing import Routing

SHARES = {"qwen3-235b-a22b": (4, 8, 32), "deepseek-r1": (8, 32)}
KINDS = ("allgather", "deduplicated", "slot", "pool")
TOKENS = (16, 64, 256, 1024)
MOST_ROWS = 65536
CHOICES = ("own", "packed", "bucket_rows", "moetune")
GEOMEAN_WITHIN, WORST_WITHIN = 0.01, 0.03


def traffic(layer: MoELayer, regime: Regime, rows: int, draw: int) -> Routing:
    """Returns the routing of `rows` rows that reach rank 0, from tokens of the global router.

    It does not use the code that samples routings for a tune.
    """
    shard, kind = regime.shard(layer), regime.layout or "allgather"
    generator = seeded_generator("traffic", layer.shape, regime.ep_size, kind, rows, draw)

    def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return random_top_k(generator, layer, 0, layer.num_experts, tokens, layer.top_k)

    found_ids, found_weights, found = [], [], 0
    while found < rows:
        chosen, weights = routed(rows)
        local = is_local(chosen, shard)
        if kind == "deduplicated":
            chosen, weights = chosen[local.any(1)], weights[local.any(1)]
        elif kind == "slot":
            chosen, weights = chosen[local].unsqueeze(1), weights[local].unsqueeze(1)
        elif kind == "pool":
            absent = ~local.any(1, keepdim=True)
            chosen, weights = chosen.masked_fill(absent, -1), weights.masked_fill(absent, 0.0)
            blocks = absent.view(regime.ep_size, -1).int().argsort(dim=1, stable=True)
            order = (blocks + torch.arange(0, rows, rows // regime.ep_size).unsqueeze(1)).flatten()
            chosen, weights = chosen[order], weights[order]
        found_ids.append(chosen)
        found_weights.append(weights)
        found += len(chosen)
    chosen = torch.cat(found_ids)[:rows].int()
    load = torch.bincount(chosen[is_local(chosen, shard)].long() - shard.first, minlength=shard.num_local)
    return Routing(chosen, torch.cat(found_weights)[:rows], load)


def cells(
    models: Sequence[str], kinds: Sequence[str], tokens: Sequence[int], eps: Sequence[int] = (4, 8, 32)
) -> list[dict[str, Any]]:
    """Returns every cell that has at most `MOST_ROWS` rows.

    `rows` is the expected number of rows in the kernel, and `bucket` is FlashInfer's bucket for it.
    """
    found = []
    for model, kind, sent in product(models, kinds, tokens):
        for ep in (ep for ep in SHARES[model] if ep in eps):
            layer, regime = bf16_layer(model), regime_of(ep, kind)
            rows = max(1, round(rows_for_tokens(layer, regime, sent)))
            if kind == "pool":
                rows = ep * sent
            if rows <= MOST_ROWS:
                bucket = regime.ladder.lookup(rows, regime.tune_max_num_tokens)
                found.append({"model": model, "ep": ep, "kind": kind, "tokens": sent, "rows": rows, "bucket": bucket})
    return found


def regime_of(ep: int, kind: str, bucket: int | None = None) -> Regime:
    """Returns the regime of a dispatch with FlashInfer's buckets, or with one bucket only."""
    size = {"ladder": "hybrid", "tune_max_num_tokens": MOST_ROWS} if bucket is None else {"ladder": [bucket]}
    return Regime(**{"ep_size": ep, **LOADS[kind], **size})


def tuned(layer: MoELayer, regime: Regime, rows: int) -> Tactic:
    """Returns the tactic that `moetune tune` chooses for one bucket, measured in this process."""
    backend = _backend()
    bucket = Bucket.of(layer, regime, backend, "cuda", rows)
    bench_of = partial(Bench, backend, have_run=_HAVE_RUN)
    with Compilers(backend, (9, 0)) as compilers:
        tuner = BucketTuner(bucket, bench_of, compilers, None, unheard, unheard, backend.final_s)
        return tuner.choose(tuner.search(bucket.search(backend, "auto", ()))).tactic


def unheard(*events: object) -> None:
    """Ignores events."""


def measure(cell: dict[str, Any], packed: list[int] | None) -> dict[str, Any]:
    """Returns one cell: the choices and the best known tactic, timed interleaved on the same draws of traffic."""
    layer, ep, kind, bucket = bf16_layer(cell["model"]), cell["ep"], cell["kind"], cell["bucket"]
    regime, backend = regime_of(ep, kind), _backend()
    _own_tunes(cell["model"], ep, kind == "slot")
    of_bucket = tuned(layer, regime_of(ep, kind, bucket), bucket)
    ours = of_bucket if typical_rows(layer, regime, bucket) == bucket else tuned(layer, regime, bucket)
    of_packed = pair(packed) if packed else tuned(_of_rows(layer, kind), regime_of(ep, "packed"), bucket)
    draws = tuple(traffic(layer, regime, cell["rows"], draw) for draw in range(DRAWS))
    runner = backend.prepare(Problem(layer, regime, cell["rows"], regime.shard(layer), as_draws(draws), "cuda"))
    candidates = backend.candidates(layer, regime, cell["rows"], "cuda").tactics
    choices = dict(zip(CHOICES, (own_pick(runner), of_packed, of_bucket, ours), strict=True))
    starts = [tactic for tactic in choices.values() if tactic in candidates]
    known = list(dict.fromkeys((*choices.values(), *searched(longer_search(candidates, starts), runner, range(DRAWS)))))
    times = dict(zip(known, tactics_us(runner, known, range(DRAWS), rounds=9), strict=True))
    best = min(times, key=lambda tactic: times[tactic])
    return {
        "best": ids(best), "best_us": times[best],
        **{name: ids(tactic) for name, tactic in choices.items()},
        **{f"{name}_us": times[tactic] for name, tactic in choices.items()},
        "known": [[*ids(tactic), us] for tactic, us in times.items()],
        "busiest": [int(draw.load.max()) for draw in draws],
    }  # fmt: skip


def longer_search(candidates: Sequence[Tactic], starts: Sequence[Tactic]) -> Search:
    """Returns a search that starts from the compared choices and tries every value of both GEMMs on all draws."""
    return coordinate(candidates, starts=starts, explore=1, rounds=(2, DRAWS, DRAWS), finalists=8)


def _same_dummy(line: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Returns whether both cells have the same packed routings, so that these are tuned once."""
    keys = ("model", "ep", "bucket")
    return all(line[key] == cell[key] for key in keys) and (line["kind"] == "slot") == (cell["kind"] == "slot")


def _of_rows(layer: MoELayer, kind: str) -> MoELayer:
    """Returns the layer with the kernel's number of ids in a row as its top-k, for packed routings of these rows."""
    return layer.model_copy(update={"top_k": 1}) if kind == "slot" else layer


_HAVE_RUN: set[Tactic] = set()


@cache
def _backend() -> FlashInferCutlassBackend:
    return FlashInferCutlassBackend()


@cache
def _own_tunes(model: str, ep: int, one_id: bool) -> None:
    """Runs FlashInfer's autotune once for each of its keys, which have ep and the ids in a row but no dispatch."""
    layer, regime = bf16_layer(model), regime_of(ep, "slot" if one_id else "allgather")
    kinds = [kind for kind in KINDS if (kind == "slot") == one_id]
    largest = max(cell["bucket"] for cell in cells([model], kinds, TOKENS, [ep]))
    regime = regime.model_copy(update={"tune_max_num_tokens": largest})
    print(f"FlashInfer tunes {model} at EP{ep}, k={'1' if one_id else layer.top_k}: "
          f"{own_autotune(_backend().prepare(unseen_problem(layer, regime, 8192, 1))):.1f} s", flush=True)  # fmt: skip


def summary(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the regret of each choice for each dispatch: the geometric mean and the worst over the cells."""
    found = []
    for kind in sorted({line["kind"] for line in lines}):
        of_kind = [line for line in lines if line["kind"] == kind]
        for choice in CHOICES:
            ratios = [line[f"{choice}_us"] / line["best_us"] for line in of_kind]
            worst = max(ratios) - 1
            found.append({"kind": kind, "choice": choice, "cells": len(ratios), "geomean": geomean(ratios) - 1,
                          "worst": worst})  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default=",".join(SHARES))
    parser.add_argument("--ep", default="4,8,32")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=550.0, help="start no cell after this many seconds")
    parser.add_argument("--summary", action="store_true", help="print the summary of OUT; measure nothing")
    options = parser.parse_args()
    begin, journal = time.perf_counter(), Journal(options.out)
    tokens, eps = ([int(part) for part in given.split(",")] for given in (options.tokens, options.ep))
    wanted = cells(options.models.split(","), options.kinds.split(","), tokens, eps)
    missing = [] if options.summary else [cell for cell in wanted if not journal.find(**cell)]
    if missing:
        warm_flashinfer()
    for cell in missing:
        if time.perf_counter() - begin > options.seconds:
            break
        packed = next((line["packed"] for line in journal.lines if _same_dummy(line, cell)), None)
        line = journal.add(**cell, **measure(cell, packed))
        regrets = {name: line[f"{name}_us"] / line["best_us"] - 1 for name in CHOICES}
        print(cell, f"best {line['best_us']:.1f} µs", {name: f"{r:+.2%}" for name, r in regrets.items()}, flush=True)
    lines = [found for cell in wanted if (found := journal.find(**cell))]
    if not lines:
        return 1
    table = summary(lines)
    print("| dispatch | choice | cells | geomean | worst |\n|---|---|---|---|---|")
    for row in table:
        print(f"| {row['kind']} | {row['choice']} | {row['cells']} | {row['geomean']:.2%} | {row['worst']:.2%} |")
    ours = [row for row in table if row["choice"] == "moetune"]
    return int(any(row["geomean"] > GEOMEAN_WITHIN or row["worst"] > WORST_WITHIN for row in ours))


if __name__ == "__main__":
    sys.exit(main())
