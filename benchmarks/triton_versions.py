"""Measures how much a tactic's rank moves between versions of Triton.

In each cell, a layer and a bucket, the same tactics are timed under each version, in a process of its own: the default,
the packaged profiles' winners, and the neighbors of these. Each version is measured in two passes, so that a version's
second pass shows what noise alone does. The archives of `triton_archives.py` give the versions; `installed` is the one
of the environment. A finished cell is a line of the journal, and the same command goes on where it stopped.

    python benchmarks/triton_versions.py measure --journal versions.jsonl --versions installed,3.5.1,3.8.0
    python benchmarks/triton_versions.py report --journal versions.jsonl
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from common import Journal, means_us
from triton_archives import FOLDER, archive_of, unpack

from moetune.inputs.presets import layer as layer_of
from moetune.search.revalidate import steps
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean
from moetune.store.profile import Profile
from moetune.store.reading import load_profile

PROFILES = Path(__file__).parents[1] / "profiles"
INSTALLED = "installed"
PASSES = 2
TACTICS = 40
ROWS = (8, 32, 128, 512, 2048, 8192)
LAYERS = {"qwen3-235b-a22b": Precision.FP8_BLOCK, "qwen3-30b-a3b": Precision.BF16}
REGIME = Regime(ep_size=8, attention_dp=True, dispatch="allgather")
DRAWS = 4
ROUNDS = 6


class Cell(NamedTuple):
    """A layer and a bucket."""

    layer: MoELayer
    rows: int


class Recorded(NamedTuple):
    """The mean times in µs of one cell under one version in one pass, by tactic."""

    times_us: Mapping[Tactic, float]
    default: Tactic


class Moved(NamedTuple):
    """What it costs to run the winner of one version under another.

    Attributes:
        kept: the regret of the old winner in each cell, plus one.
        checked: the same of the fastest of the old winner, its neighbors and the default.
        tau: Kendall's rank correlation of the two versions' times in each cell.
    """

    kept: tuple[float, ...]
    checked: tuple[float, ...]
    tau: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "report", "one"), help="`one` measures the Triton of this process")
    parser.add_argument("--journal", type=Path, default=Path("triton_versions.jsonl"))
    parser.add_argument("--versions", default=INSTALLED, help="comma-separated; each but `installed` has an archive")
    parser.add_argument("--archives", type=Path, default=FOLDER)
    parser.add_argument("--seconds", type=float, default=540.0, help="start no cell after this many seconds")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--tactics", type=int, default=TACTICS, help="the most tactics of a cell")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.what == "report":
        print("\n".join(report(recorded(Journal(options.journal).lines))))
    elif options.what == "one":
        measure_installed(options, time.monotonic() + options.seconds)
    else:
        sys.exit(measure_all(options, time.monotonic() + options.seconds))


def measure_all(options: argparse.Namespace, end: float) -> int:
    """Measures each version in a process of its own. Returns 1 if one of them failed."""
    failed = 0
    for version in options.versions.split(","):
        words = ["--journal", str(options.journal), "--passes", str(options.passes), "--rows", options.rows]
        words += ["--tactics", str(options.tactics), "--device", options.device]
        words += ["--seconds", f"{max(end - time.monotonic(), 0):.0f}"]
        code = subprocess.run(
            [sys.executable, __file__, "one", *words], env=environment_with(version, options.archives), check=False
        ).returncode
        print(f"triton {version}: {'done' if code == 0 else f'exit code {code}'}", flush=True)
        failed |= code != 0
    return int(failed)


def environment_with(version: str, archives: Path) -> dict[str, str]:
    """Returns this process's environment variables with a version of Triton before all other packages."""
    if version == INSTALLED:
        return dict(os.environ)
    before = [str(unpack(archive_of(version, archives)).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(before)}


def measure_installed(options: argparse.Namespace, end: float) -> None:
    """Measures every cell that the journal lacks under the Triton of this process."""
    import torch
    import triton

    from moetune.backends.grouped_triton.backend import TritonBackend
    from moetune.measure.compiling import Compilers, capability_of

    journal, backend, device = Journal(options.journal), TritonBackend(), options.device
    profiles = [load_profile(path) for path in sorted(PROFILES.rglob("*.json"))]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    shared = {"triton": triton.__version__, "torch": str(torch.__version__), "device": name}
    cells = cells_of([int(rows) for rows in options.rows.split(",")])
    with Compilers(backend, capability_of(device)) as compilers:
        chosen = {cell: tactics_of(backend, cell, profiles, device, options.tactics) for cell in cells}
        for cell, tactics in chosen.items():
            compilers.request(cell.layer, REGIME, cell.rows, tactics)
        for number in range(options.passes):
            for cell, tactics in chosen.items():
                key = {**shared, "model": cell.layer.name, "rows": cell.rows, "pass": number}
                if journal.find(**key):
                    continue
                if time.monotonic() > end:
                    print(f"{cell.layer.name} {cell.rows} rows, pass {number}: left for the next run", flush=True)
                    continue
                uncompiled = compilers.wait(cell.layer, REGIME, cell.rows, tactics)
                times = times_of(backend, cell, [each for each in tactics if each not in uncompiled], device)
                listed = [{"tactic": dict(tactic), "us": times.get(tactic)} for tactic in tactics]
                journal.add(**key, precision=cell.layer.precision.value, times=listed, default=dict(tactics[0]))
                best = min(times.values())
                print(f"triton {triton.__version__} {cell.layer.name} {cell.rows} rows: best {best:.1f} µs", flush=True)


def cells_of(rows: Sequence[int]) -> list[Cell]:
    """Returns the cells: each layer with each row count."""
    layers = [layer_of(name).model_copy(update={"precision": precision}) for name, precision in LAYERS.items()]
    return [Cell(layer, count) for layer in layers for count in rows]


def tactics_of(backend: Any, cell: Cell, profiles: Sequence[Profile], device: str, most: int) -> list[Tactic]:
    """Returns the tactics of a cell: the default, the packaged winners, then the winners' neighbors in turn.

    The winners are those of the cell's row count in profiles of the same precision, those of the same layer first.
    """
    candidates = backend.candidates(cell.layer, REGIME, cell.rows, device).tactics
    offered = set(candidates)
    alike = [profile for profile in profiles if profile.layer.precision is cell.layer.precision]
    alike.sort(key=lambda profile: profile.layer.name != cell.layer.name)
    winners = dict.fromkeys(profile.choice(cell.rows).tactic for profile in alike)
    lines = [steps(candidates, winner) for winner in winners if winner in offered]
    neighbors = [line[at] for at in range(max(map(len, lines), default=0)) for line in lines if at < len(line)]
    default = backend.default(cell.layer, REGIME, cell.rows)
    wanted = dict.fromkeys((default, *winners, *neighbors))
    return [tactic for tactic in wanted if tactic in offered][:most]


def times_of(backend: Any, cell: Cell, tactics: Sequence[Tactic], device: str) -> dict[Tactic, float]:
    """Returns the mean time of each tactic that runs, in µs, over interleaved rounds on the same draws."""
    from moetune.backends.base import Problem
    from moetune.measure.clock import clock_for
    from moetune.workload.draws import as_draws
    from moetune.workload.routing import realize

    routings = [realize(cell.layer, REGIME, cell.rows, draw=draw) for draw in range(DRAWS)]
    problem = Problem(cell.layer, REGIME, cell.rows, REGIME.shard(cell.layer), as_draws(routings), device)
    runner = backend.prepare(problem)
    clock = clock_for(device)
    running = []
    for tactic in tactics:
        try:
            clock.warm_up(partial(runner.run, tactic), 0)
            running.append(tactic)
        except Exception as error:  # a tactic that one version does not run is left out of its comparisons
            print(f"{tactic}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
    calls = [partial(runner.run, tactic) for tactic in running]
    return dict(zip(running, means_us(calls, range(DRAWS), ROUNDS, clock), strict=True))


def recorded(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[tuple[str, int], Recorded]]:
    """Returns what a journal has, by (version, pass) and then by (model, rows)."""
    found: dict[tuple[str, int], dict[tuple[str, int], Recorded]] = {}
    for line in lines:
        times = {Tactic(each["tactic"]): each["us"] for each in line["times"] if each["us"] is not None}
        cells = found.setdefault((line["triton"], line["pass"]), {})
        cells[line["model"], line["rows"]] = Recorded(times, Tactic(line["default"]))
    return found


def moved(
    old: Mapping[tuple[str, int], Recorded],
    again: Mapping[tuple[str, int], Recorded],
    truth: Mapping[tuple[str, int], Recorded],
) -> Moved:
    """Returns what the winners of one version lose under another, over the cells that all have.

    Args:
        old: the first pass of the version that chose.
        again: the first pass of the version that runs; the check chooses by it.
        truth: the second pass of the version that runs. Regrets are against its best.
    """
    kept, checked, taus = [], [], []
    for cell in old.keys() & again.keys() & truth.keys():
        common = [tactic for tactic in old[cell].times_us if tactic in again[cell].times_us]
        common = [tactic for tactic in common if tactic in truth[cell].times_us]
        before, now, times = (each[cell].times_us for each in (old, again, truth))
        winner = min(common, key=lambda tactic: before[tactic])
        near = [tactic for tactic in (winner, old[cell].default, *steps(common, winner)) if tactic in common]
        best = min(times[tactic] for tactic in common)
        kept.append(times[winner] / best)
        checked.append(times[min(near, key=lambda tactic: now[tactic])] / best)
        taus.append(kendall([before[tactic] for tactic in common], [times[tactic] for tactic in common]))
    return Moved(tuple(kept), tuple(checked), tuple(taus))


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns Kendall's τ-a: the share of pairs in the same order, less the share in the opposite order."""
    signs = [
        (a > b) - (a < b) if (c > d) - (c < d) > 0 else (b > a) - (b < a) if (c > d) - (c < d) < 0 else 0
        for (a, c), (b, d) in combinations(zip(one, other, strict=True), 2)
    ]
    return fmean(signs) if signs else 1.0


def report(found: Mapping[tuple[str, int], Mapping[tuple[str, int], Recorded]]) -> Iterator[str]:
    """Yields a line for each ordered pair of versions. A version beside itself shows the noise."""
    versions = sorted({version for version, _ in found}, key=_numbers)
    yield "chosen by  run by  cells  kept: mean  worst  checked: mean  worst  tau"
    for old in versions:
        for new in versions:
            if not {(old, 0), (new, 0), (new, 1)} <= found.keys():
                continue
            result = moved(found[old, 0], found[new, 0], found[new, 1])
            if result.kept:
                yield (
                    f"{old:>9}  {new:>6}  {len(result.kept):5}  {geomean(result.kept) - 1:10.2%}"
                    f"  {max(result.kept) - 1:5.1%}  {geomean(result.checked) - 1:13.2%}"
                    f"  {max(result.checked) - 1:5.1%}  {fmean(result.tau):.3f}"
                )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdecimal())


if __name__ == "__main__":
    main()
