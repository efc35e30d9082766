"""Looks for faster configurations beyond the 1,920 that the engines' tuners try.

vLLM passes each entry of a configuration to Triton, so a file may also have more stages, other numbers of warps, blocks
of other sizes, and `maxnreg`, the most registers of a thread. In eight cells of each deployment that `every_row.py`
measured under all-gather, its choice is timed against variants of it in interleaved rounds, by moetune's own kernel.

    PYTHONPATH=. python benchmarks/wider_space.py measure OUT.jsonl --cells benchmarks/results/every_row-h200.jsonl
    PYTHONPATH=. python benchmarks/wider_space.py report OUT.jsonl

OUT is a journal: the same command continues there. The choice is timed twice in each round, so `again` is what noise
alone does. `report` prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import LOADS, Journal

import moetune
from moetune.backends.base import Problem
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.measure.bench import Bench
from moetune.measure.compiling import Compilers, capability_of
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

UNSEEN = 100_000
"""No tune uses the draws from this number on."""
DRAWS = 8
STEPS = (1, 6, 12, 17, 22, 27, 32, 37)
"""The places of the cells among the 40 row counts of a deployment."""
ROUNDS = (2, 6)
CELL_SECONDS = 0.5
"""About how long the rounds of a cell may take."""
SINGLE = {
    "num_stages": (6, 7, 8),
    "num_warps": (2, 16),
    "GROUP_SIZE_M": (2, 4, 8, 128),
    "maxnreg": (64, 80, 96, 128, 168),
    "BLOCK_SIZE_N": (16, 512),
}
"""Values outside the space of the engines' tuners, each tried alone."""
TOGETHER = (
    *({"num_warps": 8, "maxnreg": registers} for registers in (64, 96, 128)),
    *({"num_warps": 2, "num_stages": stages} for stages in (4, 6, 8)),
    {"BLOCK_SIZE_K": 32, "num_stages": 8},
    {"BLOCK_SIZE_K": 512, "num_stages": 2},
)


def variants(choice: Tactic, *, fp8: bool) -> list[Tactic]:
    """Returns the tactics beyond the engines' space that differ from `choice` in one or two values.

    Args:
        choice: the tactic to vary.
        fp8: whether the weights have 128×128 scale blocks. Then BLOCK_SIZE_K stays.
    """
    changes = [*({name: value} for name, values in SINGLE.items() for value in values), *TOGETHER]
    made = (Tactic({**choice, **change}) for change in changes if not (fp8 and "BLOCK_SIZE_K" in change))
    return [tactic for tactic in dict.fromkeys(made) if tactic != choice]


def cells(lines: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the journaled Triton cells at `STEPS` of each deployment, the small row counts of all deployments first.

    Args:
        lines: the lines of the journal of `every_row.py`.
    """
    deployments = defaultdict(list)
    for line in lines:
        if line["kind"] == "cell" and line["backend"] == "triton" and line["load"] == "allgather":
            deployments[line["model"], line["ep"]].append(line)
    for step in STEPS:
        for measured in deployments.values():
            yield from sorted(measured, key=lambda line: line["rows"])[step : step + 1]


def measure(journal: Journal, measured: Iterable[Mapping[str, Any]], end: float, device: str = "cuda") -> int:
    """Times the variants of each cell that the journal lacks, and adds a line for each.

    Returns:
        The number of cells that are left when the time ends.
    """
    backend, left = TritonBackend(), 0
    with Compilers(backend, capability_of(device)) as compilers:
        work = []
        for cell in measured:
            name = {key: cell[key] for key in ("model", "ep", "rows")}
            if journal.find(**name) is not None:
                continue
            layer = moetune.layer(name["model"])
            regime = Regime(**{"ep_size": name["ep"], "attention_dp": True, **LOADS["allgather"], "ladder": "vllm"})
            choice, default = (Tactic(cell["tactics"][which]) for which in ("choice", "default"))
            fp8 = layer.precision.value.startswith("fp8")
            others = [tactic for tactic in (default, *variants(choice, fp8=fp8)) if tactic != choice]
            compilers.request(layer, regime, name["rows"], [choice, *others])
            work.append((name, layer, regime, choice, others))
        for done, (name, layer, regime, choice, others) in enumerate(work):
            if time.time() > end:
                left = len(work) - done
                break
            rows = name["rows"]
            failed = compilers.wait(layer, regime, rows, [choice, *others])
            draws = as_draws(realize(layer, regime, rows, None, UNSEEN + draw) for draw in range(DRAWS))
            bench = Bench(backend, Problem(layer, regime, rows, regime.shard(layer), draws, device))
            found = compare(bench, choice, [tactic for tactic in others if tactic not in failed])
            line = journal.add(**name, choice=dict(choice), nocompile=len(failed), **found)
            print(f"{name['model']} {rows}: {_described(line)}", flush=True)
    return left


def compare(bench: Bench, choice: Tactic, others: Sequence[Tactic]) -> dict[str, Any]:
    """Times the choice, the others, and the choice again in interleaved rounds.

    Returns:
        `us`: the choice's mean time. `again`: the second time over the first. `results`: each other tactic's time over
        the choice's, and the tactic, the fastest first. `failed`: the reasons by tactic.
    """
    everyone = [choice, *others, choice]
    round_us = DRAWS * sum(series[0] for series in bench.samples(everyone, [0]) if series)
    least, most = ROUNDS
    rounds = min(most, max(least, int(1e6 * CELL_SECONDS / max(round_us, 1.0))))
    first, *rest, again = map(_mean_us, bench.samples(everyone, list(range(DRAWS)) * rounds))
    if first is None or again is None:
        raise SystemExit(f"The choice {choice} failed: {bench.failures.get(choice)}")
    ratios = {tactic: us / first for tactic, us in zip(others, rest, strict=True) if us is not None}
    results = [(ratios[tactic], dict(tactic)) for tactic in sorted(ratios, key=lambda tactic: ratios[tactic])]
    failed = {str(tactic): reason[:100] for tactic, reason in bench.failures.items()}
    return {"us": first, "again": again / first, "results": results, "failed": failed}


def _mean_us(series: Sequence[float] | None) -> float | None:
    """Returns the mean over the draws of the medians over the rounds."""
    return None if series is None else statistics.fmean(statistics.median(series[at::DRAWS]) for at in range(DRAWS))


def _described(line: Mapping[str, Any]) -> str:
    ratio, tactic = line["results"][0]
    return (
        f"{line['us']:.0f} µs, again {line['again']:.4f}, the fastest other {ratio:.4f} with {_changed(line, tactic)}"
    )


def _changed(line: Mapping[str, Any], tactic: Mapping[str, Any]) -> str:
    """Returns the values that differ from the choice's."""
    return ", ".join(f"{name} {value}" for name, value in tactic.items() if line["choice"].get(name) != value)


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the cells, and for each changed value the geometric mean of its times over the choice's."""
    rows = [
        "| layer | EP | rows | choice (µs) | again | fastest other | its changes |",
        "|---|---|---|---|---|---|---|",
    ]
    changes = defaultdict(list)
    for line in lines:
        for ratio, tactic in line["results"]:
            changes[_changed(line, tactic)].append(ratio)
        fastest, tactic = line["results"][0]
        found = f"{line['us']:.0f} | {line['again']:.4f} | {fastest:.4f} | {_changed(line, tactic)}"
        rows.append(f"| {line['model']} | {line['ep']} | {line['rows']} | {found} |")
    best = geomean([min(1.0, line["results"][0][0]) for line in lines])
    again = geomean([min(1.0, line["again"]) for line in lines])
    rows += [
        "",
        f"If each cell had its fastest tactic: {best:.4f} of the choices' time. If each had the smaller of the "
        f"two times of its choice: {again:.4f}.",
        "",
        "| change | cells | geometric mean | fastest | slowest |",
        "|---|---|---|---|---|",
    ]
    for name, ratios in sorted(changes.items(), key=lambda item: geomean(item[1])):
        if 4 * len(ratios) >= len(lines):
            rows.append(f"| {name} | {len(ratios)} | {geomean(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure the cells that the journal lacks")
    measuring.add_argument("journal", type=Path)
    measuring.add_argument("--cells", type=Path, required=True, help="the journal of every_row.py")
    measuring.add_argument("--seconds", type=float, default=480.0, help="begin nothing after this many seconds")
    reporting = commands.add_parser("report", help="print the journal as Markdown")
    reporting.add_argument("journal", type=Path)
    options = parser.parse_args(arguments)
    journal = Journal(options.journal)
    if options.command == "report":
        print(markdown(journal.lines))
        return 0
    lines = [json.loads(line) for line in options.cells.read_text().splitlines()]
    left = measure(journal, cells(lines), time.time() + options.seconds)
    print(f"{left} cells are left." if left else "All is measured.")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
