"""moetune against FlashInfer's own autotune of the same op, in one run: what each costs, and whose choices are faster.

    PYTHONPATH=. python benchmarks/flashinfer_autotune.py OUT.jsonl [--model qwen3-235b-a22b] [--ep 4]
        [--dispatch packed|none|allgather|ENGINE:NAME] [--ladder hybrid] [--seconds 550] [--record]

Both are clocked from inputs ready to choices made. Then, bucket by bucket, FlashInfer's pick (twice: A/A) and moetune's
are timed interleaved on 32 draws that neither has seen (a tactic's lead differs from draw to draw by a few percent):
on as many rows as the bucket has, as FlashInfer's dummies, and on those that are met in it, as moetune's, where these
are others. The untuned tactic is timed apart: it is so slow that the GPU cools down. OUT is a journal: the same command
goes on where it stopped. `--record` also sweeps all tactics of each GEMM beside moetune's other one: a table for
`coordinate`. Exits 1 where moetune's choice is more than 1 % slower than FlashInfer's on
either row count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common import LOADS, Journal
from flashinfer_common import (
    DRAWS,
    bf16_layer,
    ids,
    own_autotune,
    own_pick,
    pair,
    tactics_us,
    unseen_problem,
    warm_flashinfer,
)

from moetune.backends.flashinfer_cutlass.backend import DEFAULT_TACTIC, FlashInferCutlassBackend
from moetune.inputs.dispatcher import resolve
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.stats import geomean
from moetune.workload.draws import typical_rows

COMPARED_DRAWS = 32
WITHIN = 0.01
MIDDLE = (128, 1024)


def regime_of(layer: MoELayer, ep: int, dispatch: str, ladder: str = "hybrid") -> Regime:
    """A load by name, or what an engine's dispatcher brings; in FlashInfer's buckets, by which this op is looked up."""
    brings = LOADS[dispatch] if dispatch in LOADS else resolve(dispatch, layer, ep)
    return Regime(**{"ep_size": ep, **brings, "ladder": ladder})


def tune_both(journal: Journal, key: dict[str, Any], layer: MoELayer, regime: Regime) -> dict[str, Any]:
    """Both tuners' choices by rows, and their seconds."""
    import torch

    from moetune.tuning.tune import tune

    backend, largest = FlashInferCutlassBackend(), max(regime.buckets)  # its weights are freed at the end
    warm_flashinfer()
    runner = backend.prepare(unseen_problem(layer, regime, largest, 1))
    own_s = own_autotune(runner)
    own = {rows: ids(own_pick(backend.prepare(unseen_problem(layer, regime, rows, 1)))) for rows in regime.buckets}
    del runner, backend
    torch.cuda.empty_cache()
    started: list[float] = []
    with tempfile.TemporaryDirectory() as store:
        begin = time.perf_counter()
        profile = tune(
            layer, regime, "flashinfer-cutlass", store, on_event=lambda event: started.append(time.perf_counter())
        )
        end = time.perf_counter()
    chosen = {choice.rows: ids(choice.tactic) for choice in profile.choices}
    tried = {choice.rows: choice.tried for choice in profile.choices}
    return journal.add(
        **key, kind="tuned", own_s=own_s, moetune_s=end - started[0], moetune_whole_s=end - begin,
        own=own, moetune=chosen, tried=tried, device=torch.cuda.get_device_name(),
    )  # fmt: skip


def compare(layer: MoELayer, regime: Regime, bucket: int, tuned: dict[str, Any], rows: int) -> dict[str, Any]:
    """One bucket's choices, interleaved on unseen draws of `rows` rows."""
    own, chosen = pair(tuned["own"][str(bucket)]), pair(tuned["moetune"][str(bucket)])
    runner = _backend().prepare(unseen_problem(layer, regime, rows, COMPARED_DRAWS))
    own_us, moetune_us, again_us = tactics_us(runner, [own, chosen, own], range(COMPARED_DRAWS), rounds=5)
    (untuned_us,) = tactics_us(runner, [DEFAULT_TACTIC], range(DRAWS), rounds=1)
    return {
        "own": ids(own), "moetune": ids(chosen), "own_us": own_us, "moetune_us": moetune_us,
        "untuned_us": untuned_us, "noise": abs(again_us / own_us - 1),
    }  # fmt: skip


def record(layer: MoELayer, regime: Regime, rows: int, tuned: dict[str, Any]) -> dict[str, Any]:
    """All tactics of each GEMM beside moetune's choice of the other, and the ten best of each together; µs."""
    backend, fixed = _backend(), pair(tuned["moetune"][str(rows)])
    tactics = backend.candidates(layer, regime, rows, "cuda").tactics[1:]
    runner = backend.prepare(unseen_problem(layer, regime, rows))
    if fixed not in tactics:
        fixed = tactics[0]
    sweeps = {}
    for name, other in (("gemm1", "gemm2"), ("gemm2", "gemm1")):
        line = [tactic for tactic in tactics if tactic[other] == fixed[other]]
        sweeps[name] = dict(zip([int(t[name]) for t in line], tactics_us(runner, line, range(DRAWS), 3), strict=True))
    best = {name: sorted(times, key=lambda config: times[config])[:10] for name, times in sweeps.items()}
    together = [pair((a, b)) for a in best["gemm1"][:4] for b in best["gemm2"][:4]]
    pairs = tactics_us(runner, together, range(DRAWS), 5)
    return {
        "fixed": ids(fixed), "gemm1_us": sweeps["gemm1"], "gemm2_us": sweeps["gemm2"],
        "pairs": [[*ids(tactic), us] for tactic, us in zip(together, pairs, strict=True)],
    }  # fmt: skip


@cache
def _backend() -> FlashInferCutlassBackend:
    """One, so that weights are made once."""
    return FlashInferCutlassBackend()


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speedup of moetune's choices over FlashInfer's: the worst and the best bucket, geomeans, and the largest noise.

    A bucket that was timed on two row counts counts by both together; `slower` and `worst_at` tell each alone, as the
    bucket and the rows.
    """
    both: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        both.setdefault(line["rows"], []).append(line)
    gains = {
        rows: sum(line["own_us"] for line in of_bucket) / sum(line["moetune_us"] for line in of_bucket)
        for rows, of_bucket in both.items()
    }
    middle = [gain for rows, gain in gains.items() if MIDDLE[0] <= rows <= MIDDLE[1]]
    alone = {(line["rows"], line["at"]): line["own_us"] / line["moetune_us"] for line in lines}
    worst = min(alone, key=lambda rows_at: alone[rows_at])
    return {
        "buckets": len(gains),
        "worst": min(gains.values()),
        "best": max(gains.values()),
        "geomean": geomean(list(gains.values())),
        "geomean_128_1024": geomean(middle) if middle else None,
        "noise": max(line["noise"] for line in lines),
        "slower": sorted(rows_at for rows_at, gain in alone.items() if gain < 1 / (1 + WITHIN)),
        "worst_at": (*worst, alone[worst]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen3-235b-a22b")
    parser.add_argument("--ep", type=int, default=4)
    parser.add_argument("--dispatch", default="packed")
    parser.add_argument("--ladder", default="hybrid")
    parser.add_argument("--seconds", type=float, default=550.0, help="no bucket is begun after this long")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    begin, journal, layer = time.perf_counter(), Journal(options.out), bf16_layer(options.model)
    regime = regime_of(layer, options.ep, options.dispatch, options.ladder)
    key = {"model": options.model, "ep": options.ep, "dispatch": options.dispatch, "ladder": options.ladder}
    tuned = journal.find(**key, kind="tuned") or tune_both(journal, key, layer, regime)
    print(f"FlashInfer {tuned['own_s']:.1f} s, moetune {tuned['moetune_s']:.1f} s for {len(regime.buckets)} buckets")
    for rows in regime.buckets:
        late = time.perf_counter() - begin > options.seconds
        if options.record and not late and not journal.find(**key, kind="table", rows=rows):
            journal.add(**key, kind="table", rows=rows, **record(layer, regime, rows, tuned))
        for at in sorted({rows, typical_rows(layer, regime, rows)}, reverse=True):
            line = journal.find(**key, kind="bucket", rows=rows, at=at)
            if line is None and late:
                continue
            if line is None:
                line = journal.add(**key, kind="bucket", rows=rows, at=at, **compare(layer, regime, rows, tuned, at))
            gain = line["own_us"] / line["moetune_us"] - 1
            print(
                f"{rows:>6}, {at:>5} rows: FlashInfer {line['own']} {line['own_us']:9.1f} µs, "
                f"moetune {line['moetune']} {line['moetune_us']:9.1f} µs: {gain:+7.2%} "
                f"(A/A {line['noise']:.2%}, untuned {line['untuned_us']:.0f} µs)",
                flush=True,
            )
    buckets = [line for line in journal.lines if key.items() <= line.items() and line["kind"] == "bucket"]
    if not buckets:
        return 1
    found = summary(buckets)
    print(found)
    return 1 if found["slower"] else 0


if __name__ == "__main__":
    sys.exit(main())
