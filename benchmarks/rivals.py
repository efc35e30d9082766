"""Measures which flag of vLLM selects the fastest kernels for fp8 blocks by row count, and what vLLM's own order costs.

In each deployment (model, ep, load) everything that can run is tuned or timed as `moetune tune --backend auto` does it:
Triton, FlashInfer's op and DeepGEMM. `tokens` are those of all ranks together, which are the rows under all-gather.

    PYTHONPATH=. python benchmarks/rivals.py measure OUT.jsonl --seconds 500
    PYTHONPATH=. python benchmarks/rivals.py report OUT.jsonl

On a host with the pieces of stock vLLM, its environment has to be sourced first, so that `vllm`, `deep_gemm` and
`flashinfer` are found. What is missing is named in the report. OUT is a journal, and its store lies beside it: the same
command continues there. `report` prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import LOADS, Journal

import moetune
from moetune.cli.backend_choice import options_of_engine
from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.stats import geomean
from moetune.tuning.comparison import ComparedBucket, Comparison, FlagAnswer, FlagCost
from moetune.workload.dispatch import rows_for_tokens

DEPLOYMENTS = (("deepseek-r1", 8), ("qwen3-235b-a22b-fp8", 8))
COMPARED = ("allgather", "deduplicated")
TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384)
ENGINE = "vllm"
LEAST_S = 20.0
"""No deployment begins with less time than this."""


def layer_of(model: str) -> MoELayer:
    """Returns the layer of a model of `DEPLOYMENTS`: a preset, or with `-fp8` a preset in fp8 blocks."""
    name = model.removesuffix("-fp8")
    found = preset(name)
    return found if name == model else found.model_copy(update={"name": model, "precision": Precision.FP8_BLOCK})


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model on `ep` ranks under one load."""

    model: str
    ep: int
    load: str

    def regime(self, layer: MoELayer, tokens: Iterable[int]) -> Regime:
        """Returns the regime with a bucket for the rows of each number of tokens of all ranks together."""
        plain: dict[str, Any] = {"ep_size": self.ep, "distribution": "random", **LOADS[self.load]}
        rows = {max(1, round(rows_for_tokens(layer, Regime(**plain), count / self.ep))) for count in tokens}
        ladder = ",".join(map(str, sorted(rows)))
        return Regime(**plain, ladder=ladder, tune_max_num_tokens=max(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "report"])
    parser.add_argument("journal", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0, help="about how long all of it may take")
    parser.add_argument("--models", default="", help="only these models, separated by commas")
    parser.add_argument("--loads", default=",".join(COMPARED))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of all ranks together")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    journal = Journal(options.journal)
    if options.action == "measure":
        models = options.models.split(",") if options.models else [model for model, _ in DEPLOYMENTS]
        wanted = [
            Deployment(model, ep, load)
            for model, ep in DEPLOYMENTS
            if model in models
            for load in options.loads.split(",")
        ]
        tokens = [int(count) for count in options.tokens.split(",")]
        left = measure(journal, wanted, tokens, time.time() + options.seconds, options.device)
        print(f"{left} deployments are left", flush=True)
        if left:
            raise SystemExit(1)
    else:
        print("\n".join(report(journal.lines)))


def measure(
    journal: Journal,
    deployments: Sequence[Deployment],
    tokens: Sequence[int],
    end: float,
    device: str = "cuda",
    *,
    isolate: bool = True,
) -> int:
    """Compares all kernels in each deployment that the journal lacks.

    A deployment whose tunes did not reach every bucket in time is not written. Its choices are stored, so the next call
    goes on with them.

    Returns:
        The number of deployments that are left when the time ends.
    """
    lacking = [each for each in deployments if journal.find(**asdict(each)) is None]
    left = len(lacking)
    for at, deployment in enumerate(lacking):
        seconds = (end - time.time()) / (len(lacking) - at)
        if seconds < LEAST_S:
            break
        layer = layer_of(deployment.model)
        comparison = moetune.tune_all(
            layer,
            deployment.regime(layer, tokens),
            journal.path.with_suffix(".store"),
            device=device,
            isolate=isolate,
            time_budget_s=seconds,
            options=options_of_engine(ENGINE),
        )
        if whole(comparison):
            journal.add(**asdict(deployment), comparison=comparison.model_dump(mode="json"))
            left -= 1
        print(f"{deployment.model} EP{deployment.ep} {deployment.load}: {_said(comparison)}", flush=True)
    return left


def whole(comparison: Comparison) -> bool:
    """Returns whether every backend that did not fail has a choice for every bucket."""
    buckets = len(comparison.regime.buckets)
    return all(
        result.profile is not None and len(result.profile.choices) == buckets
        for result in comparison.families
        if not result.failed
    )


def report(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields for each deployment the times by rows and the flags, and then what vLLM's own order costs in all."""
    if not lines:
        yield "No deployments."
        return
    compared = {_name(line): Comparison.model_validate(line["comparison"]) for line in lines}
    yield f"On {', '.join(sorted({each.device for each in compared.values()}))}."
    own: dict[str, list[float]] = {"decode": [], "prefill": []}
    for name, comparison in compared.items():
        answer = comparison.answers.get(ENGINE)
        yield from ("", f"**{name}**", "")
        if answer is None:
            yield "No flag of vLLM selects any of the kernels that ran."
            continue
        yield from _times(comparison, answer)
        yield ""
        yield from _flags(answer)
        yield from (f"Not here: {other}: {why}." for other, why in comparison.left_out.items() if _of_engine(other))
        result = next((each for each in answer.flags if each.backend == answer.default), None)
        for phase in own if result else ():
            if own_cost := getattr(result, phase):
                own[phase].append(own_cost.mean)
    yield ""
    for phase, means in own.items():
        if means:
            cost = _percent(geomean(means))
            yield f"What vLLM runs without a flag costs {cost} in {phase}, over {len(means)} deployments."


def _times(comparison: Comparison, answer: FlagAnswer) -> Iterator[str]:
    names = [result.backend for result in answer.flags]
    yield f"| rows | phase | {' | '.join(f'{name}, µs' for name in names)} | fastest | vLLM's own is slower by |"
    yield f"|---|---|{'---|' * len(names)}---|---|"
    for bucket in comparison.buckets:
        times = [bucket.times_us.get(name) for name in names]
        shown = ["–" if us is None else f"{us:.1f}" for us in times]
        phase = "decode" if bucket.rows <= answer.decode_rows else "prefill"
        least = min((us for us in times if us is not None), default=None)
        own = bucket.times_us.get(answer.default or "")
        slower = "–" if own is None or least is None else _percent(own / least)
        yield f"| {bucket.rows} | {phase} | {' | '.join(shown)} | {_fastest(bucket)} | {slower} |"


def _fastest(bucket: ComparedBucket) -> str:
    if not bucket.interleaved:
        return f"{bucket.winner}, not interleaved"
    return bucket.winner if bucket.decided else "too close to call"


def _flags(answer: FlagAnswer) -> Iterator[str]:
    ranges = [f"{each.first_rows} … {each.last_rows} {each.flag}" for each in answer.ranges]
    yield f"By rows: {', '.join(ranges)}. One flag for all: {answer.one_flag or 'none has all times'}."
    yield f"Separate pools: decode {answer.decode_flag}, prefill {answer.prefill_flag}. Slower than the fastest:"
    yield ""
    yield "| flag | decode: mean | worst | prefill: mean | worst |"
    yield "|---|---|---|---|---|"
    for result in answer.flags:
        mark = " (without a flag)" if result.backend == answer.default else ""
        cells = " | ".join(f"{_mean(cost)} | {_worst(cost)}" for cost in (result.decode, result.prefill))
        yield f"| `{result.flag}`{mark} | {cells} |"
    yield ""


def _mean(cost: FlagCost | None) -> str:
    return "–" if cost is None else _percent(cost.mean)


def _worst(cost: FlagCost | None) -> str:
    return "–" if cost is None else f"{_percent(cost.worst)} at {cost.worst_rows}"


def _percent(slowdown: float) -> str:
    return f"{100 * (slowdown - 1):.1f} %"


def _of_engine(backend: str) -> bool:
    """Returns whether a flag of vLLM selects the backend for fp8 blocks."""
    from moetune.inputs.engine_flags import engine_flags

    return ENGINE in engine_flags(backend, Precision.FP8_BLOCK)


def _name(line: Mapping[str, Any]) -> str:
    return f"{line['model']} EP{line['ep']} {line['load']}"


def _said(comparison: Comparison) -> str:
    answer = comparison.answers.get(ENGINE)
    if answer is None:
        return "no flag of vLLM selects what ran"
    return ", ".join(f"{each.first_rows} … {each.last_rows} {each.flag}" for each in answer.ranges)


if __name__ == "__main__":
    main()
