"""Tests a warm-up around stock `cutlass_fused_moe` in three starts of an engine.

    PYTHONPATH=. python benchmarks/warmup.py [--model qwen3-235b-a22b] [--ep 4] [--layout packed] [--maximum 8192]

Each start is a new process. The first tunes inside `moetune.warmup`. The second has the same store: it must measure
nothing and be ready in under a second. In these two the op is timed inside the warm-up and after it; the times must be
within 2 % of each other. The third has only the exported file, which stock FlashInfer reads with
`autotune(False, cache=FILE)`: every bucket must hit, and the op must run within 2 % of the exported tactics' own time.
Exits 1 if one of these fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import means_us
from flashinfer_common import bf16_layer, unseen_problem, warm_flashinfer

import moetune
from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend
from moetune.dep_bench.flashinfer_choice import own_pick
from moetune.measure.clock import CudaClock, TimedCall
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

BACKEND = "flashinfer-cutlass"
TIMED_ROWS = (16, 256, 1024)
READY_SECONDS = 1.0
SAME = 0.02
DRAWS = 8
ROUNDS = 15


def op_times_us(calls: Sequence[TimedCall]) -> list[float]:
    """Returns the time of each call in µs; every call must be capturable in a CUDA graph."""
    clock = CudaClock("cuda")
    times = means_us(calls, range(DRAWS), ROUNDS, clock)
    assert not clock.eager, clock.eager
    return times


class Engine:
    """An engine that calls the op on one rank's weights without naming a tactic."""

    def __init__(self, layer: MoELayer, regime: Regime) -> None:
        from flashinfer.fused_moe import cutlass_fused_moe

        self._op, self.layer, self.regime = cutlass_fused_moe, layer, regime
        self._backend = FlashInferCutlassBackend()

    def runner(self, rows: int) -> Any:
        return self._backend.prepare(unseen_problem(self.layer, self.regime, rows, DRAWS))

    def call(self, runner: Any, draw: int) -> object:
        return self._op(**runner.arguments(draw))

    def inside_and_after_us(self, store: str) -> dict[int, tuple[float, float]]:
        """Returns the op's times at `TIMED_ROWS` inside a second warm-up and outside, interleaved, in µs."""

        def inside(runner: Any, draw: int) -> object:
            with moetune.warmup(self.layer, self.regime, rank=0, store=store):
                return self.call(runner, draw)

        times = {}
        for rows in TIMED_ROWS:
            if rows <= self.regime.tune_max_num_tokens:
                runner = self.runner(rows)
                first, second = op_times_us([partial(inside, runner), partial(self.call, runner)])
                times[rows] = (first, second)
        return times


def start(layer: MoELayer, regime: Regime, store: str) -> dict[str, Any]:
    """Starts an engine once, and returns counts and seconds of the warm-up, and the op's times inside and after it."""
    import torch

    warm_flashinfer()  # loading the op's module is not part of the warm-up
    engine = Engine(layer, regime)
    largest = engine.runner(regime.tune_max_num_tokens)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with moetune.warmup(layer, regime, rank=0, store=store) as seen:
        engine.call(largest, 0)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "served": len(seen.served),
        "tuned": len(seen.tuned),
        "missed": len(seen.missed),
        "inside_and_after_us": engine.inside_and_after_us(store),
    }


def from_file(layer: MoELayer, regime: Regime, store: str) -> dict[int, dict[str, Any]]:
    """Starts an engine that has only the exported file, and returns the tactic and the times of each bucket."""
    from flashinfer.autotuner import AutoTuner, autotune

    from moetune.export.flashinfer import export

    profile = moetune.load(layer, regime, BACKEND, store)
    ((name, text),) = export(profile).files.items()
    path = Path(store) / Path(name).name
    path.with_suffix(".cache").write_text(text)
    warm_flashinfer()
    AutoTuner.get().clear_cache()
    engine = Engine(layer, regime)
    rows_of: dict[int, dict[str, Any]] = {}
    with autotune(False, cache=str(path.with_suffix(".cache"))):
        for choice in profile.choices:
            runner = engine.runner(choice.rows)
            picked = own_pick(runner)
            rows_of[choice.rows] = {"hit": picked == choice.tactic, "picked": dict(picked)}
            if choice.rows in TIMED_ROWS:
                mine, theirs = op_times_us([partial(runner.run, choice.tactic), partial(engine.call, runner)])
                rows_of[choice.rows] |= {"exported_us": mine, "op_us": theirs}
    return rows_of


def child(options: argparse.Namespace, what: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--store", options.store, "--child", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-235b-a22b")
    parser.add_argument("--ep", type=int, default=4)
    parser.add_argument("--layout", default="packed", help="a layout, or none for pure EP")
    parser.add_argument("--maximum", type=int, default=8192)
    parser.add_argument("--store")
    parser.add_argument("--child", choices=("start", "file"))
    options = parser.parse_args()
    layout = {} if options.layout == "none" else {"layout": options.layout}
    layer = bf16_layer(options.model)
    regime = Regime(ep_size=options.ep, ladder="hybrid", tune_max_num_tokens=options.maximum, **layout)
    if options.child:
        print(json.dumps({"start": start, "file": from_file}[options.child](layer, regime, options.store)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        options.store = options.store or folder
        first, second, third = child(options, "start"), child(options, "start"), child(options, "file")
    print(f"{layer.name}, {regime.slug}, {len(regime.buckets)} buckets")
    for name, seen in (("first start", first), ("second start", second)):
        print(
            f"{name}: {seen['seconds']:.2f} s; {seen['served']} served, {seen['tuned']} tuned, {seen['missed']} missed"
        )
        for rows, (inside, after) in seen["inside_and_after_us"].items():
            print(f"  {rows:>6} rows: {inside:9.1f} µs inside, {after:9.1f} µs after")
    hits = sum(bucket["hit"] for bucket in third.values())
    print(f"exported file: {hits} of {len(third)} buckets hit")
    slower = 0.0
    for rows, bucket in third.items():
        if "op_us" in bucket:
            slower = max(slower, abs(bucket["op_us"] / bucket["exported_us"] - 1))
            print(f"  {rows:>6} rows: {bucket['op_us']:9.1f} µs, the exported tactic {bucket['exported_us']:9.1f} µs")
    held = {
        "the first start tuned every bucket": first["tuned"] == len(regime.buckets),
        "the second start measured nothing": not second["tuned"] and second["served"] == len(regime.buckets),
        f"and was ready in under {READY_SECONDS:g} s": second["seconds"] < READY_SECONDS,
        f"inside and after are within {SAME:.0%}": all(
            abs(inside / after - 1) <= SAME
            for seen in (first, second)
            for inside, after in seen["inside_and_after_us"].values()
        ),
        "every bucket of the file hits": hits == len(third) == len(regime.buckets),
        f"the op runs within {SAME:.0%} of the exported tactics": slower <= SAME,
    }
    for what, holds in held.items():
        print(f"{'ok  ' if holds else 'FAIL'} {what}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
