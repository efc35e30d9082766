"""Measures moetune's choice for Marlin's MoE kernel against the block sizes that vLLM's and SGLang's formulas choose.

In each deployment (model, ep, load) the backend `marlin` is tuned as a user tunes it. Then every row count is a cell:
moetune's choice, vLLM's formula (0.26 … 0.33), SGLang's (0.5.23) and the choice again are timed in interleaved rounds,
on draws that no tune used. `tokens` are those of all ranks together, which are the rows under all-gather.

    PYTHONPATH=. python benchmarks/marlin_blocks.py measure OUT.jsonl --seconds 500
    PYTHONPATH=. python benchmarks/marlin_blocks.py report OUT.jsonl

OUT is a journal, and its store lies beside it: the same command continues there. `report` prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common import LOADS, Journal

import moetune
from moetune.backends.base import Problem
from moetune.backends.marlin.backend import MarlinBackend
from moetune.backends.marlin.formulas import Formula
from moetune.inputs.presets import layer as preset
from moetune.measure.bench import Bench
from moetune.measure.probe import environment
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean, noise_floor, paired_ratio
from moetune.tuning.events import BucketStarted, Event
from moetune.workload.dispatch import rows_for_tokens
from moetune.workload.draws import as_draws, untouched
from moetune.workload.routing import realize

DEPLOYMENTS = (
    ("kimi-k2.5", 8),
    ("kimi-k2.5", 16),
    ("gpt-oss-120b", 4),
    ("gpt-oss-120b", 8),
    ("deepseek-v4-like", 8),
)
NO_PRESETS = {
    "deepseek-v4-like": MoELayer(
        name="deepseek-v4-like",
        num_experts=256,
        top_k=6,
        hidden_size=4096,
        intermediate_size=2048,
        precision=Precision.MXFP4,
        activation=Activation.SILU_CLAMPED,
        num_shared_experts=1,
        routing=RoutingMethod(scoring="sqrtsoftplus", bias=True, scaling=1.5),
    )
}
"""Layers that are no presets. This one has the sizes of DeepSeek-V4-Flash."""
COMPARED = ("allgather", "deduplicated")
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMULAS: tuple[Formula, ...] = ("vllm", "sglang")
SLOWER = 1.01
"""A choice that takes more than this times a formula's time counts as slower."""
CELL_SECONDS = 1.0
"""About how long the interleaved rounds of a cell may take."""
ROUNDS = (3, 12)
"""The least and the most rounds over all draws of a cell."""


def layer_of(model: str) -> MoELayer:
    """Returns the layer of a model of `DEPLOYMENTS`."""
    return NO_PRESETS.get(model) or preset(model)


class _TimeUpError(Exception):
    """The time is up, so no further bucket may start."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model on `ep` ranks under one load."""

    model: str
    ep: int
    load: str

    def rows(self, layer: MoELayer, tokens: Iterable[int]) -> dict[int, int]:
        """Returns the rows that enter a rank's kernel, by the tokens of all ranks together."""
        regime = self.regime()
        return {all_: max(1, round(rows_for_tokens(layer, regime, all_ / self.ep))) for all_ in tokens}

    def regime(self, rows: Iterable[int] = ()) -> Regime:
        """Returns the regime, with a bucket for each of `rows`. No environment variable changes its distribution."""
        ladder = {"ladder": ",".join(map(str, sorted(set(rows))))} if rows else {}
        return Regime(**{"ep_size": self.ep, "distribution": "random", **LOADS[self.load], **ladder})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "report"])
    parser.add_argument("journal", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0, help="start no bucket and no cell after this many")
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
        end, tokens = time.time() + options.seconds, [int(count) for count in options.tokens.split(",")]
        print(f"{measure(journal, wanted, tokens, end, options.device)} cells are left", flush=True)
    else:
        print("\n".join(report(journal.lines)))


def measure(
    journal: Journal, deployments: Iterable[Deployment], tokens: Sequence[int], end: float, device: str = "cuda"
) -> int:
    """Tunes each deployment and measures its cells, those that the journal lacks.

    Returns:
        The number of cells that are left when the time ends.
    """
    left = 0
    for deployment in deployments:
        layer = layer_of(deployment.model)
        rows = deployment.rows(layer, tokens)
        lacking = [count for count in tokens if journal.find(**asdict(deployment), tokens=count) is None]
        if not lacking:
            continue
        backend = MarlinBackend()  # one for the tune and the cells, so that the weights are made once
        try:
            choices = tuned(deployment, layer, backend, rows.values(), journal.path.with_suffix(".store"), end, device)
            for done, count in enumerate(lacking):
                if time.time() > end:
                    left += len(lacking) - done
                    break
                line = cell(deployment, layer, backend, rows[count], choices[rows[count]], device)
                line = journal.add(**asdict(deployment), tokens=count, rows=rows[count], **line)
                print(f"{_name(line)}, {count} tokens: {_gains(line)}", flush=True)
        except _TimeUpError:
            left += len(lacking)
        _free(device)
    return left


def tuned(
    deployment: Deployment,
    layer: MoELayer,
    backend: MarlinBackend,
    rows: Iterable[int],
    store: Path,
    end: float,
    device: str,
) -> dict[int, Tactic]:
    """Returns moetune's choice by rows. What the store has is not measured again.

    Raises:
        _TimeUpError: the time is up before the last bucket.
    """

    def stop(event: Event) -> None:
        if isinstance(event, BucketStarted) and time.time() > end:
            raise _TimeUpError

    regime = deployment.regime(rows)
    profile = moetune.tune(layer, regime, backend, store, device=device, isolate=False, on_event=stop)
    return {choice.rows: choice.tactic for choice in profile.choices}


def cell(
    deployment: Deployment, layer: MoELayer, backend: MarlinBackend, rows: int, choice: Tactic, device: str
) -> dict[str, Any]:
    """Compares the choice with both formulas at one row count, and with itself.

    Returns:
        `tactics`, `us`: by `choice`, `vllm` and `sglang`. `gain`: a formula's time over the choice's with its 95 %
        bounds; exactly 1 where the formula has the choice. `noise`: the A/A noise of the choice. `device`, `versions`.
    """
    regime = deployment.regime([rows])
    shard, draws = regime.shard(layer), untouched(regime.draws)
    problem = Problem(
        layer, regime, rows, shard, as_draws(realize(layer, regime, rows, None, draw) for draw in draws), device
    )
    tactics = {"choice": choice} | {each: MarlinBackend(each).default(layer, regime, rows) for each in FORMULAS}
    others = [tactic for tactic in dict.fromkeys(tactics.values()) if tactic != choice]
    bench, everyone = Bench(backend, problem), [choice, *others, choice]
    count = len(problem.draws)
    once = [series for series in bench.samples(everyone, range(count)) if series]
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(1e6 * CELL_SECONDS / max(sum(map(sum, once)), 1.0))))
    first, *rest, again = bench.samples(everyone, list(range(count)) * rounds)
    if first is None or again is None or None in rest:
        raise SystemExit(f"A tactic failed: {bench.failures}")
    times = {choice: first, **dict(zip(others, rest, strict=True))}
    ratios = {each: paired_ratio(times[tactics[each]], first) for each in FORMULAS}  # type: ignore[arg-type]
    found = environment(backend, device)
    return {
        "tactics": {name: dict(tactic) for name, tactic in tactics.items()},
        "us": {name: fmean(times[tactic] or ()) for name, tactic in tactics.items()},
        "gain": {each: [ratio.value, ratio.low, ratio.high] for each, ratio in ratios.items()},
        "noise": noise_floor(first, again),
        "device": found.strict.get("device", device),
        "versions": dict(found.strict),
    }


def report(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a table of the cells, and one line for each deployment and load with the geometric means."""
    if not lines:
        yield "No cells."
        return
    yield f"On {', '.join(sorted({line['device'] for line in lines}))}."
    yield ""
    yield "| model, ep, load | tokens | rows | choice | vLLM's block | SGLang's | µs | gain over vLLM | over SGLang |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for line in lines:
        blocks = [line["tactics"][each]["block_size_m"] for each in FORMULAS]
        gains = [f"{value:.3f} ({low:.3f} … {high:.3f})" for value, low, high in map(line["gain"].get, FORMULAS)]
        shown = (
            line["tokens"],
            line["rows"],
            Tactic(line["tactics"]["choice"]),
            *blocks,
            f"{line['us']['choice']:.1f}",
        )
        yield f"| {_name(line)} | {' | '.join(map(str, shown))} | {' | '.join(gains)} |"
    yield ""
    yield "| load | cells | over vLLM's formula | over SGLang's formula | slower than vLLM's | than SGLang's |"
    yield "|---|---|---|---|---|---|"
    names = list(dict.fromkeys(_name(line) for line in lines))
    groups = {name: [line for line in lines if _name(line) == name] for name in names}
    groups |= {f"all {load}": [line for line in lines if line["load"] == load] for load in COMPARED}
    for name, group in groups.items():
        if group:
            means = [f"{geomean([line['gain'][each][0] for line in group]):.3f}×" for each in FORMULAS]
            slower = [str(sum(line["gain"][each][0] < 1 / SLOWER for line in group)) for each in FORMULAS]
            yield f"| {name} | {len(group)} | {' | '.join(means)} | {' | '.join(slower)} |"


def _name(line: Mapping[str, Any]) -> str:
    return f"{line['model']} EP{line['ep']} {line['load']}"


def _gains(line: Mapping[str, Any]) -> str:
    gains = ", ".join(f"{line['gain'][each][0]:.3f} over {each}" for each in FORMULAS)
    return f"{line['us']['choice']:.1f} µs, {gains}, noise {line['noise']:.3f}"


def _free(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
