"""Compares moetune with FlashInfer's own autotune of the same op: the time to tune, and the speed of the choices.

    PYTHONPATH=. python benchmarks/flashinfer_autotune.py OUT.jsonl [--model qwen3-235b-a22b] [--precision bf16]
        [--ep 4] [--dispatch packed|none|allgather|ENGINE:NAME] [--ladder hybrid] [--backend-option KEY=VALUE]
        [--seconds 550] [--record]

The time to tune is from ready inputs to the last choice. Then, for each bucket, FlashInfer's choice (twice, as an A/A
pair) and moetune's are timed interleaved on 32 draws that neither tuner used, because a tactic's lead differs by a few
percent between draws. The draws have the bucket's own rows, as FlashInfer's dummies do. If the bucket's typical rows
differ from these, all are timed at the typical rows too. The untuned tactic is timed separately, because it is so slow
that the GPU cools down. OUT is a journal: the same command continues where it stopped. `--record` also times all
tactics of each GEMM together with moetune's choice for the other GEMM, which makes a table for tests of `coordinate`.
Exits 1 if moetune's choice is more than 1 % slower than FlashInfer's at either row count.

Mixed input, on Hopper: `--model gpt-oss-120b --precision mxfp4 --ep 4` and `--ep 8`, with `--backend-option
caller=sglang` for SGLang's padding and `mxfp4_activations=fp8` for e4m3 activations; `--precision w4a8` for int4 in
groups of 128. kimi-k2.5's int4 has groups of 32, which the op does not take.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import LOADS, Journal
from flashinfer_common import (
    DRAWS,
    ids,
    pair,
    tactics_us,
    unseen_problem,
    warm_flashinfer,
)

from moetune.backends.base import Backend
from moetune.backends.flashinfer_cutlass.backend import DEFAULT_TACTIC
from moetune.cli.backend_choice import backend_with, read_pairs
from moetune.dep_bench.flashinfer_choice import own_autotune, own_pick
from moetune.inputs.dispatcher import resolve
from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.stats import geomean
from moetune.workload.draws import typical_rows

BACKEND = "flashinfer-cutlass"
COMPARED_DRAWS = 32
WITHIN = 0.01
MIDDLE = (128, 1024)


def regime_of(layer: MoELayer, ep: int, dispatch: str, ladder: str = "hybrid") -> Regime:
    """Returns the regime of a load or of an engine's dispatcher, with the ladder that FlashInfer uses for this op."""
    fields = LOADS[dispatch] if dispatch in LOADS else resolve(dispatch, layer, ep)
    return Regime(**{"ep_size": ep, **fields, "ladder": ladder})


def tune_both(
    journal: Journal, key: dict[str, Any], layer: MoELayer, regime: Regime, options: Mapping[str, str]
) -> dict[str, Any]:
    """Tunes with both, and returns the line with their choices for each bucket and the seconds that they took."""
    import torch

    from moetune.tuning.tune import tune

    backend, largest = backend_of(options), max(regime.buckets)  # its weights are freed at the end
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
            layer, regime, backend_of(options), store, on_event=lambda event: started.append(time.perf_counter())
        )
        end = time.perf_counter()
    chosen = {choice.rows: ids(choice.tactic) for choice in profile.choices}
    tried = {choice.rows: choice.tried for choice in profile.choices}
    return journal.add(
        **key, kind="tuned", own_s=own_s, moetune_s=end - started[0], moetune_whole_s=end - begin,
        own=own, moetune=chosen, tried=tried, device=torch.cuda.get_device_name(),
    )  # fmt: skip


def compare(
    backend: Backend, layer: MoELayer, regime: Regime, bucket: int, tuned: dict[str, Any], rows: int
) -> dict[str, Any]:
    """Times one bucket's choices interleaved on `rows` rows, on draws that no tuner used."""
    own, chosen = pair(tuned["own"][str(bucket)]), pair(tuned["moetune"][str(bucket)])
    runner = backend.prepare(unseen_problem(layer, regime, rows, COMPARED_DRAWS))
    own_us, moetune_us, again_us = tactics_us(runner, [own, chosen, own], range(COMPARED_DRAWS), rounds=5)
    (untuned_us,) = tactics_us(runner, [DEFAULT_TACTIC], range(DRAWS), rounds=1)
    return {
        "own": ids(own), "moetune": ids(chosen), "own_us": own_us, "moetune_us": moetune_us,
        "untuned_us": untuned_us, "noise": abs(again_us / own_us - 1),
    }  # fmt: skip


def record(backend: Backend, layer: MoELayer, regime: Regime, rows: int, tuned: dict[str, Any]) -> dict[str, Any]:
    """Returns times in µs of all tactics of each GEMM with moetune's choice for the other, and of the best pairs."""
    fixed = pair(tuned["moetune"][str(rows)])
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


def backend_of(options: Mapping[str, str]) -> Backend:
    """Returns the backend with these options, as text by name."""
    return backend_with(BACKEND, options)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the speedup of moetune's choices: worst and best bucket, geometric means, and the largest noise.

    A bucket that was timed at two row counts has one speedup, from the sums of its times. `slower` and `worst_at`
    treat each row count separately, as a pair of bucket and rows.
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
    parser.add_argument("--precision", type=Precision, default=Precision.BF16)
    parser.add_argument("--ep", type=int, default=4)
    parser.add_argument("--dispatch", default="packed")
    parser.add_argument("--ladder", default="hybrid")
    parser.add_argument("--backend-option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=float, default=550.0, help="start no bucket after this many seconds")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    begin, journal = time.perf_counter(), Journal(options.out)
    layer = preset(options.model).model_copy(update={"precision": options.precision})
    regime = regime_of(layer, options.ep, options.dispatch, options.ladder)
    given = read_pairs(options.backend_option)
    backend = backend_of(given)  # one, so that weights are made once
    if reason := backend.unsupported(layer, regime):
        parser.error(f"{BACKEND}: {reason}")
    key = {
        "model": options.model, "precision": layer.precision.value, "ep": options.ep, "dispatch": options.dispatch,
        "ladder": options.ladder, "options": " ".join(f"{name}={value}" for name, value in sorted(given.items())),
    }  # fmt: skip
    tuned = journal.find(**key, kind="tuned") or tune_both(journal, key, layer, regime, given)
    print(f"FlashInfer {tuned['own_s']:.1f} s, moetune {tuned['moetune_s']:.1f} s for {len(regime.buckets)} buckets")
    for rows in regime.buckets:
        late = time.perf_counter() - begin > options.seconds
        if options.record and not late and not journal.find(**key, kind="table", rows=rows):
            journal.add(**key, kind="table", rows=rows, **record(backend, layer, regime, rows, tuned))
        for at in sorted({rows, typical_rows(layer, regime, rows)}, reverse=True):
            line = journal.find(**key, kind="bucket", rows=rows, at=at)
            if line is None and late:
                continue
            if line is None:
                found = compare(backend, layer, regime, rows, tuned, at)
                line = journal.add(**key, kind="bucket", rows=rows, at=at, **found)
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
    summed = summary(buckets)
    print(summed)
    return 1 if summed["slower"] else 0


if __name__ == "__main__":
    sys.exit(main())
