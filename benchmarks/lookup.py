"""Times a profile's look-up of a tactic and FlashInfer's `AutoTuner.choose_one`, which every MoE call runs.

    python benchmarks/lookup.py

Both have a tactic for each of FlashInfer's hybrid buckets up to 8192 rows, and look up the same rows, interleaved in
this process. FlashInfer's tuner is the real one with the tuning configuration and the inputs of its CUTLASS MoE. It is
not in tuning mode, and always hits its in-memory cache. The tactics of both must agree. Exits 1 if `Profile.tactic`
takes a microsecond or more, or is less than 8 times faster, on either load.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import quartiles_line, wall_us
from flashinfer.autotuner import AutoTuner, DynamicTensorSpec, TunableRunner, TuningConfig
from flashinfer.fused_moe.utils import get_hybrid_num_tokens_buckets, make_hybrid_bucket_mapper

from moetune.measure.clock import TimedCall
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile

MOST_US = 1.0
LEAST_RATIO = 8.0
ROUNDS = 21
CALLS = 4000
MAX_ROWS = 8192
OPERATION = "trtllm::fused_moe::gemm1"


class MoERunner(TunableRunner):  # type: ignore[misc]
    """A runner that has the name of the CUTLASS MoE's runner and launches nothing."""

    def get_valid_tactics(self, inputs: list[torch.Tensor], profile: Any) -> list[Any]:
        return [-1]

    def forward(self, inputs: list[torch.Tensor], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
        return None


def flashinfer_lookup(layer: MoELayer, buckets: Sequence[int]) -> Callable[[int], int]:
    """Returns FlashInfer's `choose_one` as a function of the row count."""
    if not torch.cuda.is_available():
        torch.cuda.is_current_stream_capturing = lambda: False
    config = TuningConfig(
        dynamic_tensor_specs=(
            DynamicTensorSpec((0,), (0,), get_hybrid_num_tokens_buckets(MAX_ROWS), make_hybrid_bucket_mapper(MAX_ROWS)),
        )
    )
    experts, hidden, intermediate = layer.num_experts, layer.hidden_size, layer.intermediate_size
    fc1 = torch.empty(experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device="meta")
    fc2 = torch.empty(experts, hidden, intermediate, dtype=torch.bfloat16, device="meta")
    inputs = {
        rows: [torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta"), fc1, None, fc2, None]
        for rows in range(1, MAX_ROWS + 1)
    }
    tuner, runner = AutoTuner.get(), MoERunner()
    for number, bucket in enumerate(buckets):
        shapes = tuple(tuner._get_input_sizes(inputs[bucket]))
        key = AutoTuner._get_cache_key(OPERATION, runner, shapes, config, runner.get_cache_key_extras(inputs[bucket]))
        tuner.profiling_cache[key] = (number, None)
    choose_one, runners = tuner.choose_one, [runner]
    return lambda rows: choose_one(OPERATION, runners, config, inputs[rows], gemm_idx=1)[1]


def profile_of(layer: MoELayer, regime: Regime) -> Profile:
    """Returns a profile whose tactic for a bucket is the bucket's number."""
    choices = tuple(
        Choice(
            rows=rows,
            tactic={"config": number},
            time_us=1.0,
            default_tactic={"config": 0},
            default_time_us=1.0,
            gain=1.0,
            gain_low=1.0,
            gain_high=1.0,
            noise=0.0,
            tried=1,
            candidates=1,
            load=(rows,),
            max_load=rows,
            measured_at="2026-01-01T00:00:00Z",
        )
        for number, rows in enumerate(regime.buckets)
    )
    environment = Environment(device="benchmark", strict={})
    return Profile(layer=layer, regime=regime, backend="flashinfer-cutlass", environment=environment, choices=choices)


def in_rounds(lookup: Callable[[int], Any], rounds: Sequence[Sequence[int]]) -> TimedCall:
    """Returns a call that looks up all rows of one round."""

    def call(draw: int) -> None:
        for rows in rounds[draw]:
            lookup(rows)

    return call


def main() -> int:
    layer = MoELayer(num_experts=16, top_k=8, hidden_size=2048, intermediate_size=768)
    regime = Regime(ladder="hybrid", tune_max_num_tokens=MAX_ROWS)
    ours, theirs = profile_of(layer, regime).tactic, flashinfer_lookup(layer, regime.buckets)
    for rows in range(1, MAX_ROWS + 1):  # agreement, and both are warm after it
        if ours(rows)["config"] != theirs(rows):
            print(f"{rows} rows: moetune {ours(rows)}, FlashInfer {theirs(rows)}", file=sys.stderr)
            return 1
    generator = random.Random(0)
    loads: dict[str, Callable[[], list[int]]] = {
        "a steady batch, the same rows again and again": lambda: [generator.randint(1, MAX_ROWS)] * CALLS,
        "other rows at every call": lambda: [generator.randint(1, MAX_ROWS) for _ in range(CALLS)],
    }
    print(f"{len(regime.buckets)} buckets to {MAX_ROWS} rows; {ROUNDS} interleaved rounds of {CALLS} calls, µs a call")
    met = [compared(name, [rows() for _ in range(ROUNDS)], ours, theirs) for name, rows in loads.items()]
    print(f"goal: under {MOST_US:g} µs and at least {LEAST_RATIO:g} times faster: {'met' if all(met) else 'MISSED'}")
    return 0 if all(met) else 1


def compared(name: str, rounds: Sequence[list[int]], ours: Callable[[int], Any], theirs: Callable[[int], Any]) -> bool:
    """Times both on the rows of each round and prints the quartiles; returns whether the goal is reached."""
    series = wall_us([in_rounds(ours, rounds), in_rounds(theirs, rounds)], range(len(rounds)))
    ours_us, theirs_us = ([round_us / CALLS for round_us in of_call] for of_call in series)
    ratios = [slow / fast for fast, slow in zip(ours_us, theirs_us, strict=True)]
    print(name)
    for what, values in (
        ("moetune Profile.tactic", ours_us),
        ("FlashInfer AutoTuner.choose_one", theirs_us),
        ("ratio", ratios),
    ):
        print(f"  {quartiles_line(what, values)}")
    return statistics.median(ours_us) < MOST_US and statistics.median(ratios) >= LEAST_RATIO


if __name__ == "__main__":
    sys.exit(main())
