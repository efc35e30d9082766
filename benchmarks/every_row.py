"""Compares moetune's choices with the engine's at 40 row counts that are no bucket, on draws that no tune has used.

    PYTHONPATH=. python benchmarks/every_row.py measure OUT.jsonl --store STORE --vllm ENGINE/vllm [--tune]
        [--ladder vllm|adaptive] [--only qwen3,allgather-triton] [--seconds 480]
    PYTHONPATH=. python benchmarks/every_row.py report OUT.jsonl

It takes each deployment's profile from the store; `--tune` measures what the store lacks. At each row count it times
the choice against what the engine runs there, in interleaved rounds. For vLLM's Triton kernel these are its default at
that row count, and the row of the file that vLLM ships for the layer, if there is one. For FlashInfer's CUTLASS op they
are the choice of FlashInfer's own autotuner and the untuned default. The untuned default is compared separately,
because it is so slow that the GPU cools down.

OUT is a journal, and a tune saves each bucket in the store. After `--seconds` no tune of a bucket and no cell begins;
the same command continues there. Each deployment is measured in a process of its own. `report` prints Markdown. It
exits 1 if some cell's 95 % interval lies wholly beyond 1 % slower, if the geometric mean of the gains over a backend's
default is less than 1.06, or if a cell is missing.

`--vllm` is the folder of the package `vllm`; without it an installed vLLM is taken. The package needs only the sources
around its kernel, which a wheel has:

    pip download --no-deps --dest wheels vllm==0.33.0
    unzip -q wheels/vllm-*.whl 'vllm/model_executor/layers/fused_moe/*' -d ENGINE
    touch ENGINE/vllm/__init__.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import LOADS, Journal
from every_row_report import LEAST_GAIN, NUM_ROW_COUNTS, holds, markdown, slowdown
from flashinfer_common import UNSEEN, bf16_layer, ids, pair, unseen_problem, warm_flashinfer

import moetune
from moetune.backends.base import Backend, Problem
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.defaults import engine_default
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.space import VALUES, Shapes
from moetune.backends.registry import backend as backend_of
from moetune.dep_bench.flashinfer_choice import own_autotune, own_pick
from moetune.errors import MoetuneError
from moetune.measure.bench import Bench, BenchLike
from moetune.measure.compiling import Compilers, capability_of
from moetune.measure.probe import device_for
from moetune.spec.ladder import Ladder
from moetune.spec.layer import MoELayer
from moetune.spec.model import digest_of
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.folders import PACKAGED_VARIABLE
from moetune.store.profile import Profile
from moetune.tuning.events import BucketChosen, BucketStarted, Event
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

FEWEST_ROWS, MOST_ROWS = 3, 8191
"""1, 2 and 8192 rows are buckets."""
SEED = 7
SAMPLERS = 4
"""The number of threads that sample the draws of later cells."""
ROUNDS = (2, 8)
"""The least and the most interleaved rounds over all draws of a cell."""
CELL_SECONDS = 0.3
"""About how long the rounds of one comparison may take."""
FUSED_MOE = Path("model_executor", "layers", "fused_moe")
ENGINE_LADDERS = {"triton": "vllm", "flashinfer-cutlass": "hybrid"}
"""The engine's own ladder for a backend."""
GROUPS = {"flashinfer-cutlass": (("own", "choice"), ("default", "choice"))}
"""The names of the tactics that are timed in the same rounds. The first of the first group is timed twice."""
TOGETHER = (("default", "choice", "shipped"),)
"""The same for other backends."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A layer, a load, and the backend that is tuned. The fields identify its lines in the journal."""

    model: str
    ep: int
    load: str
    backend: str = "triton"

    def __str__(self) -> str:
        return f"{self.model}-ep{self.ep}-{self.load}-{self.backend}"

    def layer(self) -> MoELayer:
        """Returns the model's layer, with bf16 experts for FlashInfer's CUTLASS op."""
        return bf16_layer(self.model) if self.backend == "flashinfer-cutlass" else moetune.layer(self.model)

    def regime(self, ladder: str | None) -> Regime:
        """Returns the regime; without a `ladder` it has the engine's own."""
        ladder = ladder or ENGINE_LADDERS.get(self.backend, "vllm")
        return Regime(**{"ep_size": self.ep, "attention_dp": True, **LOADS[self.load], "ladder": ladder})


DEPLOYMENTS = tuple(
    Deployment(model, ep, load, backend)
    for backend, model, ep in (
        ("triton", "qwen3-235b-a22b", 8),
        ("triton", "deepseek-r1", 8),
        ("triton", "minimax-m2.5", 8),
        ("triton", "qwen3-coder-480b-a35b", 16),
        ("flashinfer-cutlass", "qwen3-30b-a3b", 8),
        ("flashinfer-cutlass", "qwen3-235b-a22b", 8),
    )
    for load in ("allgather", "deduplicated")
)


class TimeUpError(Exception):
    """The time that was given is over."""


def row_counts(keys: Iterable[int] = ()) -> list[int]:
    """Returns 40 row counts between 1 and 8192, ascending, whose logarithms are evenly spread with a random offset.

    None is a bucket of `pow2`, `hybrid` or `vllm`, and none is one of `keys`, the buckets of a profile.
    """
    buckets = {size for name in ("pow2", "hybrid", "vllm") for size in Ladder.parse(name).buckets(MOST_ROWS + 1)}
    free = sorted({*range(FEWEST_ROWS, MOST_ROWS + 1)} - buckets - {*keys})
    generator, found = random.Random(SEED), set()
    for step in range(NUM_ROW_COUNTS):
        wanted = FEWEST_ROWS * (MOST_ROWS / FEWEST_ROWS) ** ((step + generator.random()) / NUM_ROW_COUNTS)
        rows = min(free, key=lambda rows: abs(rows - wanted))
        free.remove(rows)
        found.add(rows)
    return sorted(found)


def num_draws(rows: int) -> int:
    """Returns how many unseen draws a cell has. Small draws differ more from each other and take less time."""
    return 32 if rows <= 1024 else 16


def default_of(backend: Backend, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
    """Returns what runs where nothing is tuned; for Triton the engine's rule, even if the engine has a file."""
    if isinstance(backend, TritonBackend):
        return engine_default(Shapes.of(layer, regime, rows, kernel=backend.kernel))
    return backend.default(layer, regime, rows)


def shipped_rows(profile: Profile, vllm: Path | None) -> dict[int, Tactic]:
    """Returns the rows of the file that vLLM ships for a Triton profile's question; none if it ships no such file."""
    if vllm is None or profile.backend != "triton":
        return {}
    layer, regime = profile.layer, profile.regime
    named = ConfigFile.of(layer, regime, profile.environment.device, regime.shard(layer).num_local)
    path = vllm / FUSED_MOE / "configs" / named.vllm_name
    if not path.is_file():
        return {}
    return {
        int(key): Tactic({name: row[name] for name in VALUES})
        for key, row in json.loads(path.read_text()).items()
        if key.isdecimal()
    }


def nearest(shipped: Mapping[int, Tactic], rows: int) -> Tactic:
    """Returns the tactic that vLLM takes from its file; of two equally near keys the first (vLLM 0.33.0)."""
    return shipped[min(shipped, key=lambda key: abs(key - rows))]


def own_choices(key: Mapping[str, Any], journal: Journal, profile: Profile, rows: Sequence[int]) -> dict[int, Tactic]:
    """Returns what FlashInfer runs at each row count after its own autotune, which runs once and is journaled."""
    line = journal.find(**key, kind="own")
    if line is None:
        layer, regime = profile.layer, profile.regime
        backend = backend_of("flashinfer-cutlass")
        warm_flashinfer()
        largest = unseen_problem(layer, regime, regime.tune_max_num_tokens, 1)
        seconds = own_autotune(backend.prepare(largest))
        picks = {count: ids(own_pick(backend.prepare(unseen_problem(layer, regime, count, 1)))) for count in rows}
        line = journal.add(**key, kind="own", seconds=round(seconds, 1), picks=picks)
    return {int(count): pair(picked) for count, picked in line["picks"].items()}


def compare(bench: Bench, tactics: Mapping[str, Tactic], groups: Sequence[Sequence[str]], draws: int) -> dict[str, Any]:
    """Times the tactics of each group in interleaved rounds, and checks the result of the choice.

    Args:
        bench: where they are timed.
        tactics: the tactic `choice` and those that it is compared with, by name.
        groups: the names of the tactics that are timed in the same rounds.
        draws: the number of the bench's draws.

    Returns:
        `pairs`: for each other tactic the times in µs of the choice and of the other one on each draw, medians over the
        rounds. A tactic that is the same as the choice has no entry. `again`: both series of the tactic that is timed
        twice, or None if it failed. `failed`: the tactics that failed, with the reasons.
    """
    bench.check(tactics["choice"], 0)
    pairs: dict[str, dict[str, list[float]]] = {}
    again = None
    for number, group in enumerate(groups):
        present = [name for name in group if name in tactics]
        distinct = list(dict.fromkeys(tactics[name] for name in present))
        if number and len(distinct) == 1:
            continue
        series = by_draw(bench, [*distinct, *distinct[: not number]], draws)
        if not number:
            again = [series[0], series[-1]] if series[0] and series[-1] else None
        times = dict(zip(distinct, series, strict=False))
        choice_us = times[tactics["choice"]]
        for name in present:
            other_us = times[tactics[name]]
            if tactics[name] != tactics["choice"] and choice_us and other_us:
                pairs[name] = {"choice_us": choice_us, "other_us": other_us}
    failures = {name: bench.failures[tactic] for name, tactic in tactics.items() if tactic in bench.failures}
    return {"pairs": pairs, "again": again, "failed": failures}


def by_draw(bench: BenchLike, tactics: Sequence[Tactic], draws: int) -> list[list[float] | None]:
    """Returns the median over the rounds of each tactic's time on each draw in µs; None for a tactic that failed.

    The rounds of one draw have the same routing. So the draws, not the rounds, are the samples of a comparison.
    """
    once = bench.samples(tactics, [0])
    round_us = draws * sum(series[0] for series in once if series)
    least, most = ROUNDS
    rounds = min(most, max(least, int(1e6 * CELL_SECONDS / max(round_us, 1.0))))
    samples = bench.samples(tactics, list(range(draws)) * rounds)
    return [[round(statistics.median(of[draw::draws]), 3) for draw in range(draws)] if of else None for of in samples]


def measure_cells(
    deployment: Deployment,
    profile: Profile,
    backend: Backend,
    journal: Journal,
    end: float,
    *,
    ladder: str,
    vllm: Path | None = None,
    device: str = "cuda",
    counts: Sequence[int] | None = None,
) -> int:
    """Measures the cells that the journal lacks, in ascending order, and adds a line for each.

    Args:
        deployment, profile, backend: what is compared.
        journal: where the lines are added.
        end: when to begin no more cells, in seconds since the epoch.
        ladder: how the ladder was spelled.
        vllm: the folder of vLLM's package.
        device: the torch device.
        counts: the row counts; by default those of `row_counts`.

    Returns:
        The number of cells that are left.
    """
    layer, regime = profile.layer, profile.regime
    all_rows = row_counts(choice.rows for choice in profile.choices) if counts is None else counts
    key = {
        **asdict(deployment),
        "kernel": getattr(backend, "kernel", ""),
        "ladder": ladder,
        "device": profile.environment.device,
        "profile": digest_of([[choice.rows, dict(choice.tactic)] for choice in profile.choices]),
    }
    left = [rows for rows in all_rows if journal.find(**key, kind="cell", rows=rows) is None]
    if not left:
        return 0
    own = own_choices(key, journal, profile, all_rows) if deployment.backend == "flashinfer-cutlass" else {}
    shipped = shipped_rows(profile, vllm)
    tactics = {
        rows: {
            "choice": profile.tactic(rows),
            "default": default_of(backend, layer, regime, rows),
            **({"shipped": nearest(shipped, rows)} if shipped else {}),
            **({"own": own[rows]} if own else {}),
        }
        for rows in left
    }
    threads = ThreadPoolExecutor(SAMPLERS)
    try:
        routings = {
            rows: [threads.submit(realize, layer, regime, rows, None, UNSEEN + draw) for draw in range(num_draws(rows))]
            for rows in left
        }
        with Compilers(backend, capability_of(device)) as compilers:
            for rows in left:
                compilers.request(layer, regime, rows, tactics[rows].values())
            for done, rows in enumerate(left):
                if time.time() > end:
                    return len(left) - done
                draws = as_draws(routing.result() for routing in routings.pop(rows))
                compilers.wait(layer, regime, rows, list(tactics[rows].values()))
                bench = Bench(backend, Problem(layer, regime, rows, regime.shard(layer), draws, device))
                found = compare(bench, tactics[rows], GROUPS.get(deployment.backend, TOGETHER), len(draws))
                named = {name: dict(tactic) for name, tactic in tactics[rows].items()}
                line = journal.add(
                    **key, kind="cell", rows=rows, buckets=len(profile.choices), tactics=named, **found,
                    measured_at=time.strftime("%Y-%m-%d"),
                )  # fmt: skip
                print(f"{deployment} {rows:>5} rows: {', '.join(_described(line))}", flush=True)
                del bench
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
    finally:
        threads.shutdown(cancel_futures=True)
    return 0


def _described(line: Mapping[str, Any]) -> Iterator[str]:
    for name in line["tactics"]:
        if name in line["failed"]:
            yield f"{name} failed: {line['failed'][name]}"
        elif name != "choice" and (found := slowdown(line, name)):
            yield f"{name} {found.value - 1:+.2%} [{found.low - 1:+.2%}, {found.high - 1:+.2%}]"


def measure(deployment: Deployment, options: argparse.Namespace, end: float) -> str:
    """Measures one deployment, and returns why it is not complete, or an empty string."""
    try:
        device = device_for(None)
        if device.startswith("cuda"):
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // SAMPLERS))
        chosen = {"kernel": options.kernel} if deployment.backend == "triton" else {}
        backend = backend_of(deployment.backend, **chosen)
        regime = deployment.regime(options.ladder)
        profile = stored_or_tuned(deployment, regime, backend, options, end)
        left = measure_cells(
            deployment, profile, backend, Journal(options.journal), end,
            ladder=str(regime.ladder), vllm=options.vllm, device=device,
        )  # fmt: skip
    except TimeUpError:
        return "the time is up, the tune is not complete"
    except MoetuneError as error:
        return f"{error.message} {error.hint}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"the time is up, {left} cells are left" if left else ""


def stored_or_tuned(
    deployment: Deployment, regime: Regime, backend: Backend, options: argparse.Namespace, end: float
) -> Profile:
    """Returns the stored profile; with `--tune` it measures the buckets that the store lacks.

    Raises:
        MissError: the store lacks a bucket, and `--tune` is not given.
        TimeUpError: the time was over before the last bucket began.
    """

    def on_event(event: Event) -> None:
        if isinstance(event, BucketStarted) and time.time() > end:
            raise TimeUpError
        if isinstance(event, BucketChosen):
            print(f"{deployment} bucket {event.choice.rows}: gain {event.choice.gain:.3f}", flush=True)

    # no time budget: a short one would cut searches short, and the choices would be worse
    return moetune.tune(deployment.layer(), regime, backend, options.store, frozen=not options.tune, on_event=on_event)


def measure_all(options: argparse.Namespace, deployments: Sequence[Deployment], end: float) -> list[str]:
    """Measures the deployments one after the other, each in its own process.

    Returns:
        A line for each deployment that is not complete, with the reason.
    """
    left = []
    for deployment in deployments:
        reason = "the time is up" if time.time() > end else ""
        if not reason:
            begin = time.time()
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                try:
                    reason = pool.submit(measure, deployment, options, end).result()
                except BrokenProcessPool:
                    reason = "its process died"
            print(f"{deployment}: {reason or 'complete'}, {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
        if reason:
            left.append(f"{deployment}: {reason}")
    return left


def vllm_folder(given: Path | None) -> Path | None:
    """Returns the folder of vLLM's package, and lets Python find it there; None if there is no vLLM.

    Raises:
        SystemExit: `given` is not such a folder, or another vLLM is found before it.
    """
    if given is not None:
        if given.name != "vllm" or not (given / FUSED_MOE / "fused_moe.py").is_file():
            raise SystemExit(f"{given} has no {FUSED_MOE / 'fused_moe.py'}, or is not named vllm. See --help.")
        sys.path.append(str(given.resolve().parent))
    spec = find_spec("vllm")
    found = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if given is not None and (found is None or not found.samefile(given)):
        raise SystemExit(f"Python finds another vLLM before {given}: {found}. Remove that one from its path.")
    return found


def selected(only: Collection[str]) -> list[Deployment]:
    """Returns the deployments whose names contain one of these texts; all if there are none.

    Raises:
        SystemExit: no deployment's name does.
    """
    found = [each for each in DEPLOYMENTS if not only or any(text in str(each) for text in only)]
    if not found:
        raise SystemExit(
            f"No deployment is named like {', '.join(only)}. There are: {', '.join(map(str, DEPLOYMENTS))}."
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure the cells that the journal lacks")
    measuring.add_argument("journal", type=Path)
    measuring.add_argument("--store", type=Path, required=True, help="the folder of the profiles")
    measuring.add_argument("--tune", action="store_true", help="measure the buckets that the store lacks")
    measuring.add_argument("--vllm", type=Path, help="the folder of vLLM's package")
    measuring.add_argument("--kernel", choices=("vllm", "builtin"), default="vllm", help="the Triton kernel")
    measuring.add_argument("--ladder", help="the regimes' ladder [default: the engine's own: vllm, or hybrid]")
    measuring.add_argument("--only", default="", help="parts of deployments' names, such as deepseek-r1,cutlass")
    measuring.add_argument("--seconds", type=float, default=480.0, help="begin nothing after this many seconds")
    reporting = commands.add_parser("report", help="print the journal as Markdown")
    reporting.add_argument("journal", type=Path)
    reporting.add_argument("--least-gain", type=float, default=LEAST_GAIN, help="the goal for the geometric means")
    options = parser.parse_args(arguments)
    if options.command == "report":
        lines = Journal(options.journal).lines
        print(markdown(lines, options.least_gain))
        return 0 if holds(lines, options.least_gain) else 1
    end = time.time() + options.seconds
    options.vllm = vllm_folder(options.vllm)
    os.environ[PACKAGED_VARIABLE] = "0"  # the profiles are those of the store alone
    left = measure_all(options, selected([text for text in options.only.split(",") if text]), end)
    print(f"{len(left)} deployments are not complete." if left else "All is measured.", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
