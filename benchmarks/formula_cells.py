"""Compares moetune's choices with what engines choose by formulas, cell by cell; the scripts that say for what use it.

In each deployment (model, ep, load) a backend is tuned as a user tunes it. Then every row count is a cell: moetune's
choice, the formulas' tactics and the choice again are timed in interleaved rounds, on draws that no tune used.
`tokens` are those of all ranks together, which are the rows under all-gather.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common import LOADS, Journal

import moetune
from moetune.backends.base import Backend, Problem
from moetune.errors import MoetuneError, NoResultError
from moetune.measure.bench import Bench
from moetune.measure.probe import environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean, noise_floor, paired_ratio
from moetune.tuning.events import BucketStarted, Event
from moetune.workload.dispatch import rows_for_tokens
from moetune.workload.draws import as_draws, untouched
from moetune.workload.routing import realize

COMPARED = ("allgather", "deduplicated")
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SLOWER = 1.01
"""A choice that takes more than this times a formula's time counts as slower."""
CELL_SECONDS = 1.0
"""About how long the interleaved rounds of a cell may take."""
ROUNDS = (3, 12)
"""The least and the most rounds over all draws of a cell."""


@dataclass(frozen=True, slots=True)
class Formula:
    """One engine's formula.

    Attributes:
        title: whose it is, for the report.
        backend: makes a backend whose default is the formula's tactic.
        shown: what the report shows of the tactic.
        name: what it is called in the report's header.
    """

    title: str
    backend: Callable[[], Backend]
    shown: Callable[[Mapping[str, Any]], object]
    name: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is tuned and what it is compared with.

    Attributes:
        backend: makes the backend that is tuned.
        formulas: the formulas, by the names of the journal.
        layer_of: returns the layer of a model's name.
    """

    backend: Callable[[], Backend]
    formulas: Mapping[str, Formula]
    layer_of: Callable[[str], MoELayer]


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


def run(comparison: Comparison, deployments: Sequence[tuple[str, int]], description: str | None) -> None:
    """Runs a script's command line: `measure` or `report`, and a journal.

    Args:
        comparison: what is compared.
        deployments: models and numbers of ranks.
        description: the script's documentation.

    Raises:
        SystemExit: with code 1, cells are left, so that what started the script starts it again.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "report"])
    parser.add_argument("journal", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0, help="start no bucket and no cell after this many")
    parser.add_argument("--models", default="", help="only these models, separated by commas")
    parser.add_argument("--loads", default=",".join(COMPARED))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of all ranks together")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    journal = Journal(options.journal)
    if options.action == "report":
        print("\n".join(report(comparison, journal.lines)))
        return
    models = options.models.split(",") if options.models else [model for model, _ in deployments]
    wanted = [
        Deployment(model, ep, load) for model, ep in deployments if model in models for load in options.loads.split(",")
    ]
    end, tokens = time.time() + options.seconds, [int(count) for count in options.tokens.split(",")]
    left = measure(comparison, journal, wanted, tokens, end, options.device)
    print(f"{left} cells are left", flush=True)
    if left:
        raise SystemExit(1)


def measure(
    comparison: Comparison,
    journal: Journal,
    deployments: Iterable[Deployment],
    tokens: Sequence[int],
    end: float,
    device: str = "cuda",
) -> int:
    """Tunes each deployment and measures its cells, those that the journal lacks. One that fails ends no other.

    Returns:
        The number of cells that are left when the time ends.
    """
    left = 0
    for deployment in deployments:
        layer = comparison.layer_of(deployment.model)
        rows = deployment.rows(layer, tokens)
        lacking = [count for count in tokens if journal.find(**asdict(deployment), tokens=count) is None]
        if not lacking:
            continue
        backend, done = comparison.backend(), 0  # one for all cells, so that the weights are made once
        try:
            choices = tuned(deployment, layer, backend, rows.values(), journal.path.with_suffix(".store"), end, device)
            for count in lacking:
                if time.time() > end:
                    break
                line = cell(comparison, deployment, layer, backend, rows[count], choices[rows[count]], device)
                line = journal.add(**asdict(deployment), tokens=count, rows=rows[count], **line)
                done += 1
                print(f"{_name(line)}, {count} tokens: {_gains(line)}", flush=True)
        except _TimeUpError:
            pass
        except MoetuneError as error:
            print(f"{_name(asdict(deployment))}: {error.message} {error.hint}", flush=True)
        left += len(lacking) - done
        _free(device)
    return left


def tuned(
    deployment: Deployment,
    layer: MoELayer,
    backend: Backend,
    rows: Iterable[int],
    store: Path,
    end: float,
    device: str,
) -> dict[int, Tactic]:
    """Returns moetune's choice by rows. What the store has is not measured again.

    On a GPU the tactics run in a worker, so one that crashes or hangs costs itself and not what is left to measure.

    Raises:
        MoetuneError: nothing was chosen.
        _TimeUpError: the time is up before the last bucket.
    """

    def stop(event: Event) -> None:
        if isinstance(event, BucketStarted) and time.time() > end:
            raise _TimeUpError

    regime, isolate = deployment.regime(rows), device.startswith("cuda")
    profile = moetune.tune(layer, regime, backend, store, device=device, isolate=isolate, on_event=stop)
    return {choice.rows: choice.tactic for choice in profile.choices}


def cell(
    comparison: Comparison,
    deployment: Deployment,
    layer: MoELayer,
    backend: Backend,
    rows: int,
    choice: Tactic,
    device: str,
) -> dict[str, Any]:
    """Compares the choice with every formula at one row count, and with itself.

    Returns:
        `tactics`, `us`: by `choice` and the formulas' names. `gain`: a formula's time over the choice's with its 95 %
        bounds; exactly 1 where the formula has the choice. `noise`: the A/A noise of the choice. `device`, `versions`.
    """
    regime = deployment.regime([rows])
    shard, draws = regime.shard(layer), untouched(regime.draws)
    problem = Problem(
        layer, regime, rows, shard, as_draws(realize(layer, regime, rows, None, draw) for draw in draws), device
    )
    defaults = {name: formula.backend().default(layer, regime, rows) for name, formula in comparison.formulas.items()}
    tactics = {"choice": choice} | defaults
    others = [tactic for tactic in dict.fromkeys(tactics.values()) if tactic != choice]
    bench, everyone = Bench(backend, problem), [choice, *others, choice]
    count = len(problem.draws)
    once = [series for series in bench.samples(everyone, range(count)) if series]
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(1e6 * CELL_SECONDS / max(sum(map(sum, once)), 1.0))))
    first, *rest, again = bench.samples(everyone, list(range(count)) * rounds)
    if first is None or again is None or None in rest:
        raise NoResultError(
            f"At {rows} rows a tactic failed: {bench.failures}.", "The tune's choice ran in its worker."
        )
    times = {choice: first, **dict(zip(others, rest, strict=True))}
    ratios = {name: paired_ratio(times[default], first) for name, default in defaults.items()}  # type: ignore[arg-type]
    found = environment(backend, device)
    return {
        "tactics": {name: dict(tactic) for name, tactic in tactics.items()},
        "us": {name: fmean(times[tactic] or ()) for name, tactic in tactics.items()},
        "gain": {name: [ratio.value, ratio.low, ratio.high] for name, ratio in ratios.items()},
        "noise": noise_floor(first, again),
        "device": found.strict.get("device", device),
        "versions": dict(found.strict),
    }


def report(comparison: Comparison, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a table of the cells, and one line for each deployment and load with the geometric means."""
    if not lines:
        yield "No cells."
        return
    formulas = comparison.formulas
    yield f"On {', '.join(sorted({line['device'] for line in lines}))}."
    yield ""
    header = ["model, ep, load", "tokens", "rows", "choice", *(each.name for each in formulas.values()), "µs"]
    yield from _header([*header, *(f"gain over {each.title}" for each in formulas.values())])
    for line in lines:
        own = [each.shown(line["tactics"][name]) for name, each in formulas.items()]
        gains = [f"{value:.3f} ({low:.3f} … {high:.3f})" for value, low, high in map(line["gain"].get, formulas)]
        choice = Tactic(line["tactics"]["choice"])
        yield _row([_name(line), line["tokens"], line["rows"], choice, *own, f"{line['us']['choice']:.1f}", *gains])
    yield ""
    over = [f"over {each.title}'s formula" for each in formulas.values()]
    yield from _header(["load", "cells", *over, *(f"slower than {each.title}'s" for each in formulas.values())])
    names = list(dict.fromkeys(_name(line) for line in lines))
    groups = {name: [line for line in lines if _name(line) == name] for name in names}
    groups |= {f"all {load}": [line for line in lines if line["load"] == load] for load in COMPARED}
    for name, group in groups.items():
        if group:
            means = [f"{geomean([line['gain'][each][0] for line in group]):.3f}×" for each in formulas]
            slower = [sum(line["gain"][each][0] < 1 / SLOWER for line in group) for each in formulas]
            yield _row([name, len(group), *means, *slower])


def _header(cells: Sequence[str]) -> Iterator[str]:
    yield _row(cells)
    yield f"|{'---|' * len(cells)}"


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _name(line: Mapping[str, Any]) -> str:
    return f"{line['model']} EP{line['ep']} {line['load']}"


def _gains(line: Mapping[str, Any]) -> str:
    gains = ", ".join(f"{gain[0]:.3f} over {name}" for name, gain in line["gain"].items())
    return f"{line['us']['choice']:.1f} µs, {gains}, noise {line['noise']:.3f}"


def _free(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
