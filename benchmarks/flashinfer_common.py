"""What the FlashInfer benchmarks share: FlashInfer's own picks, interleaved means, a journal that resumes, tables."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moetune.backends.base import Problem
from moetune.backends.flashinfer_cutlass.backend import FlashInferCutlassBackend
from moetune.inputs.presets import layer as preset
from moetune.search.base import Search
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.routing import realize

UNSEEN = 100_000
"""Draws from this number on are seen by no tuner."""
DRAWS = 8


class Journal:
    """JSON lines, appended as they are measured; a run that stops goes on where it was.

    A line that a killed run left torn is skipped, and the next one begins on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.lines: list[dict[str, Any]] = [line for line in map(_parsed, text.splitlines()) if line is not None]
        self._torn = bool(text) and not text.endswith("\n")

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The last line that holds these values."""
        return next((line for line in reversed(self.lines) if fields.items() <= _flat(line).items()), None)

    def add(self, **fields: Any) -> dict[str, Any]:
        line = json.loads(json.dumps(fields))
        with self.path.open("a") as file:
            file.write("\n" * self._torn + json.dumps(line, separators=(",", ":")) + "\n")
        self._torn = False
        self.lines.append(line)
        return line


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not isinstance(value, list | dict)}


def bf16_layer(name: str) -> MoELayer:
    """A preset's shape with bf16 experts: DeepSeek's fp8 blocks cannot be tuned in this op."""
    return preset(name).model_copy(update={"precision": Precision.BF16})


def pair(values: Sequence[int]) -> Tactic:
    return Tactic(gemm1=values[0], gemm2=values[1])


def ids(tactic: Mapping[str, Any]) -> list[int]:
    return [tactic["gemm1"], tactic["gemm2"]]


def unseen_problem(layer: MoELayer, regime: Regime, rows: int, draws: int = DRAWS) -> Problem:
    routings = tuple(realize(layer, regime, rows, draw=UNSEEN + draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer), routings, "cuda")


def warm_flashinfer() -> None:
    """Loads the op's module and builds the tuner's small helper, on a tiny layer of its own."""
    layer, regime = MoELayer(num_experts=8, top_k=2, hidden_size=256, intermediate_size=256), Regime()
    runner = FlashInferCutlassBackend().prepare(unseen_problem(layer, regime, 2, 1))
    own_autotune(runner)


def own_autotune(runner: Any) -> float:
    """FlashInfer tunes the runner's op over all of its buckets; seconds from inputs ready to choices made."""
    import torch
    from flashinfer.autotuner import autotune
    from flashinfer.fused_moe import cutlass_fused_moe

    torch.cuda.synchronize()
    begin = time.perf_counter()
    with autotune(True):
        cutlass_fused_moe(**runner.arguments())
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def own_pick(runner: Any) -> Tactic:
    """What FlashInfer runs for this problem, as its tuner answers now."""
    from flashinfer.autotuner import AutoTuner
    from flashinfer.fused_moe import cutlass_fused_moe

    tuner, picks = AutoTuner.get(), []
    choose_one = tuner.choose_one

    def recorded(*args: Any, **kwargs: Any) -> Any:
        chosen = choose_one(*args, **kwargs)
        picks.append(chosen[1])
        return chosen

    tuner.choose_one = recorded
    try:
        cutlass_fused_moe(**runner.arguments())
    finally:
        del tuner.choose_one
    gemm1, gemm2 = picks
    return Tactic(gemm1=gemm1, gemm2=gemm2)


def means_us(
    runner: Any, tactics: Sequence[Tactic], draws: Sequence[int], rounds: int = 5, clock: Any = None
) -> list[float]:
    """Mean over the draws of each tactic's median over interleaved rounds, µs. A tactic named twice is an A/A pair."""
    if clock is None:
        from moetune.measure.clock import CudaClock

        clock = CudaClock("cuda")
    calls = [partial(runner.run, tactic) for tactic in tactics]
    for call in calls:
        clock.warm_up(call, draws[0])
    series = clock.paired_samples(calls, list(draws) * rounds)
    return [
        statistics.fmean(statistics.median(times[at :: len(draws)]) for at in range(len(draws))) for times in series
    ]


def searched(search: Search, runner: Any, draws: Sequence[int], clock: Any = None) -> tuple[Tactic, ...]:
    """A search's finalists on these draws; a tactic that raises is left out."""
    try:
        batch = next(search)
        while True:
            used = [draws[at % len(draws)] for at in range(min(batch.rounds, len(draws)))]
            running = [tactic for tactic in batch.tactics if _runs(runner, tactic)]
            batch = search.send(dict(zip(running, means_us(runner, running, used, 1, clock), strict=True)))
    except StopIteration as stop:
        return stop.value


def _runs(runner: Any, tactic: Tactic) -> bool:
    try:
        runner.run(tactic)
    except Exception as error:
        print(f"{tactic}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return False
    return True


def pair_us(table: Mapping[str, Any], tactic: Tactic) -> float:
    """A pair's time by a recorded table: the sum of its two sweeps, less the fixed pair that both hold."""
    fixed = table["gemm1_us"][str(table["fixed"][0])]
    return table["gemm1_us"][str(tactic["gemm1"])] + table["gemm2_us"][str(tactic["gemm2"])] - fixed
