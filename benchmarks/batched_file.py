"""Compares a file tuned for vLLM's grouped Triton kernel with one tuned for its batched kernel, in the batched kernel.

    PYTHONPATH=. python benchmarks/batched_file.py measure OUT.jsonl --store STORE --vllm ENGINE/vllm
        [--only qwen3-235b,ep16] [--seconds 480]
    PYTHONPATH=. python benchmarks/batched_file.py report OUT.jsonl

With DeepEP low latency or NIXL, vLLM's batched kernel reads the file of the grouped kernel, by the capacity of its
buffer. Three rows of a file are compared: what `moetune tune` chooses for the batched kernel at this capacity, and what
it chooses for the grouped kernel at as many rows, under all-gather and under the deduplicated layout. The default
without a file and the row of the file that vLLM ships are compared too. All run in vLLM's own batched kernel, taken
from its sources, at several numbers of tokens of a rank, in interleaved rounds on draws that no tune has used.

OUT is a journal, and a tune saves each bucket in the store. After `--seconds` no tune and no cell begins; the same
command continues there. `report` prints Markdown. It exits 1 if at some cell the batched kernel's own tactic is slower
than a row of the grouped kernel's file by more than 1 %, with its 95 % interval wholly beyond, or if a cell is missing.

`--vllm` is the folder of the package `vllm`; without it an installed vLLM is taken. The package needs only the sources
around its kernels; `every_row.py` says how to get them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from common import LOADS, Journal
from every_row import FUSED_MOE, TimeUpError, compare, vllm_folder
from every_row_report import slowdown
from flashinfer_common import UNSEEN

import moetune
from moetune.backends.base import Backend, Problem
from moetune.backends.batched_triton import space
from moetune.backends.batched_triton.backend import BatchedTritonBackend
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.shipped import read_rows
from moetune.errors import MoetuneError
from moetune.measure.bench import Bench
from moetune.measure.compiling import Compilers, capability_of
from moetune.measure.probe import device_for
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean
from moetune.store.folders import PACKAGED_VARIABLE
from moetune.store.profile import Profile
from moetune.tuning.events import BucketStarted, Event
from moetune.workload.draws import as_draws
from moetune.workload.routing import padded, realize

FRACTIONS: Final = (64, 16, 4, 2, 1)
"""A step has the most tokens of a rank over one of these."""
DRAWS: Final = 16
GROUPED: Final = ("allgather", "deduplicated")
"""The loads under which the grouped kernel is tuned."""
ORDER: Final = (("default", "choice", *GROUPED, "shipped"),)
"""What is timed in the same rounds. The first is timed twice."""
SLOWER: Final = 1.01


@dataclass(frozen=True, slots=True)
class Deployment:
    """A layer, its ranks, and the most tokens of a rank in one step. The fields identify its lines in the journal."""

    model: str
    ep: int
    tokens: int = 256

    def __str__(self) -> str:
        return f"{self.model}-ep{self.ep}-{self.tokens}"

    def layer(self) -> MoELayer:
        """Returns the model's layer."""
        return moetune.layer(self.model)

    @property
    def capacity(self) -> int:
        """The rows of an expert's block."""
        return self.tokens * self.ep

    def batched(self) -> Regime:
        """Returns the regime of the batched kernel."""
        return Regime(ep_size=self.ep, layout="batched", ladder=[self.capacity])

    def grouped(self, load: str) -> Regime:
        """Returns the regime of the grouped kernel under a load, with the one bucket that the capacity looks up."""
        return Regime(ep_size=self.ep, ladder=[self.capacity], **LOADS[load])

    def steps(self) -> list[int]:
        """Returns the numbers of tokens of a rank at which cells are measured, ascending."""
        return sorted({max(1, self.tokens // fraction) for fraction in FRACTIONS})


DEPLOYMENTS: Final = (
    Deployment("qwen3-30b-a3b", 8),
    Deployment("qwen3-235b-a22b", 8),
    Deployment("qwen3-235b-a22b", 8, 64),
    Deployment("qwen3-coder-480b-a35b", 16),
    Deployment("deepseek-r1", 16),
)
"""bf16, and DeepSeek-R1 in fp8 blocks, where the batched Triton kernel is vLLM's second choice after DeepGEMM."""


def tuned(layer: MoELayer, regime: Regime, backend: Backend, store: Path, end: float) -> Profile:
    """Returns the stored profile; measures what the store lacks.

    Raises:
        TimeUpError: the time was over before the bucket began.
    """

    def on_event(event: Event) -> None:
        if isinstance(event, BucketStarted) and time.time() > end:
            raise TimeUpError

    return moetune.tune(layer, regime, backend, store, on_event=on_event)


def tactics_of(
    deployment: Deployment, batched: Profile, grouped: Mapping[str, Profile], vllm: Path | None
) -> dict[str, Tactic]:
    """Returns the tactics to compare by name, as the batched kernel runs them."""
    layer, regime = deployment.layer(), deployment.batched()
    shapes = space.Shapes.of(layer, regime)
    found = {"choice": batched.tactic(deployment.capacity), "default": space.heuristic(shapes)}
    rows = {load: dict(profile.tactic(deployment.capacity)) for load, profile in grouped.items()}
    if (shipped := shipped_row(deployment, batched.environment.device, vllm)) is not None:
        rows["shipped"] = dict(shipped)
    return {**found, **{name: space.of_file(row, shapes.fp8, None) for name, row in rows.items()}}


def shipped_row(deployment: Deployment, device: str, vllm: Path | None) -> Mapping[str, Any] | None:
    """Returns the row that vLLM takes from the file that it ships; None if it ships none."""
    if vllm is None:
        return None
    layer, regime = deployment.layer(), deployment.batched()
    file = ConfigFile.of(layer, regime, device, regime.shard(layer).num_local)
    path = vllm / FUSED_MOE / "configs" / file.vllm_name
    if not path.is_file():
        return None
    by_key = read_rows(path, has_triton_version=True)
    return by_key[min(by_key, key=lambda key: abs(key - deployment.capacity))]


def measure_cells(
    deployment: Deployment,
    tactics: Mapping[str, Tactic],
    backend: Backend,
    journal: Journal,
    end: float,
    *,
    where: str,
    device: str = "cuda",
) -> int:
    """Measures the cells that the journal lacks, and adds a line for each.

    Args:
        deployment: the deployment.
        tactics: what `tactics_of` returned.
        backend: the kernel that runs them.
        journal: where the lines are added.
        end: when to begin no more cells, in seconds since the epoch.
        where: the GPU's name.
        device: the torch device.

    Returns:
        The number of cells that are left.
    """
    layer, regime = deployment.layer(), deployment.batched()
    named = {name: dict(tactic) for name, tactic in tactics.items()}
    key = {**asdict(deployment), "kernel": getattr(backend, "kernel", ""), "device": where}

    def is_measured(step: int) -> bool:
        line = journal.find(**key, kind="cell", step=step)
        return line is not None and line["tactics"] == named

    left = [step for step in deployment.steps() if not is_measured(step)]
    with Compilers(backend, capability_of(device)) as compilers:
        for done, step in enumerate(left):
            if time.time() > end:
                return len(left) - done
            compilers.wait(layer, regime, deployment.capacity, list(dict.fromkeys(tactics.values())))
            rows = step * deployment.ep
            routings = [realize(layer, regime, rows, None, UNSEEN + draw) for draw in range(DRAWS)]
            draws = as_draws([padded(routing, deployment.capacity) for routing in routings])
            problem = Problem(layer, regime, deployment.capacity, regime.shard(layer), draws, device)
            found = compare(Bench(backend, problem), tactics, ORDER, DRAWS)
            line = journal.add(
                **key, kind="cell", step=step, tactics=named, **found, measured_at=time.strftime("%Y-%m-%d")
            )
            print(f"{deployment} {step:>4} tokens a rank: {', '.join(_described(line))}", flush=True)
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    return 0


def _described(line: Mapping[str, Any]) -> Iterator[str]:
    for name in line["tactics"]:
        if name in line["failed"]:
            yield f"{name} failed: {line['failed'][name]}"
        elif name != "choice" and (found := slowdown(line, name)):
            yield f"choice/{name} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def measure(deployment: Deployment, options: argparse.Namespace, end: float) -> str:
    """Tunes and measures one deployment. Returns why it is not complete, or an empty string."""
    try:
        layer, device = deployment.layer(), device_for(None)
        batched, grouped = BatchedTritonBackend(options.kernel), TritonBackend(options.kernel)
        chosen = tuned(layer, deployment.batched(), batched, options.store, end)
        others = {load: tuned(layer, deployment.grouped(load), grouped, options.store, end) for load in GROUPED}
        tactics = tactics_of(deployment, chosen, others, options.vllm)
        name = chosen.environment.device
        left = measure_cells(deployment, tactics, batched, Journal(options.journal), end, where=name, device=device)
    except TimeUpError:
        return "the time is up, the tune is not complete"
    except MoetuneError as error:
        return f"{error.message} {error.hint}"
    return f"the time is up, {left} cells are left" if left else ""


def cells(lines: Sequence[Mapping[str, Any]]) -> dict[Deployment, dict[int, Mapping[str, Any]]]:
    """Returns the last line of each cell, by deployment and tokens of a rank."""
    found: dict[Deployment, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("kind") == "cell":
            deployment = Deployment(line["model"], line["ep"], line["tokens"])
            found.setdefault(deployment, {})[line["step"]] = line
    return {deployment: dict(sorted(of.items())) for deployment, of in found.items()}


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the gains of the batched kernel's own tactic over each other one, and geometric means."""
    others = (*GROUPED, "default", "shipped")
    rows = [
        "The batched kernel's own tactic against the rows of other files, in vLLM's batched kernel: their time over "
        "its time, with 95 % bounds.",
        "",
        f"| deployment | tokens a rank | {' | '.join(others)} |",
        f"|---|---|{'---|' * len(others)}",
    ]
    gains: dict[str, list[float]] = {name: [] for name in others}
    for deployment, by_step in cells(lines).items():
        for step, line in by_step.items():
            shown = []
            for name in others:
                ratio = slowdown(line, name)
                if ratio is None:
                    failed = name in line["failed"]
                    shown.append(f"failed: {line['failed'][name]}" if failed else "–")
                    continue
                gains[name].append(1 / ratio.value)
                shown.append(f"{1 / ratio.value:.3f}× ({1 / ratio.high:.3f} … {1 / ratio.low:.3f})")
            rows.append(f"| {deployment} | {step} | {' | '.join(shown)} |")
    means = [f"{geomean(of):.3f}×" if of else "–" for of in gains.values()]
    return "\n".join([*rows, f"| geometric mean | | {' | '.join(means)} |"])


def holds(lines: Sequence[Mapping[str, Any]], deployments: Sequence[Deployment]) -> bool:
    """Returns whether every cell is measured, and at none the own tactic is slower than a grouped file's row by 1 %."""
    found = cells(lines)
    if any(set(found.get(each, {})) != set(each.steps()) for each in deployments):
        return False
    ratios = [slowdown(line, name) for by_step in found.values() for line in by_step.values() for name in GROUPED]
    return all(ratio.low <= SLOWER for ratio in ratios if ratio is not None)


def selected(only: str) -> list[Deployment]:
    """Returns the deployments whose names contain one of these texts, separated by commas; all if there are none."""
    texts = [text for text in only.split(",") if text]
    return [each for each in DEPLOYMENTS if not texts or any(text in str(each) for text in texts)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="tune and measure what the store and the journal lack")
    measuring.add_argument("journal", type=Path)
    measuring.add_argument("--store", type=Path, required=True, help="the folder of the profiles")
    measuring.add_argument("--vllm", type=Path, help="the folder of vLLM's package")
    measuring.add_argument("--kernel", choices=("vllm", "builtin"), default="vllm", help="the Triton kernels")
    measuring.add_argument("--seconds", type=float, default=480.0, help="begin nothing after this many seconds")
    reporting = commands.add_parser("report", help="print the journal as Markdown")
    reporting.add_argument("journal", type=Path)
    for command in (measuring, reporting):
        command.add_argument("--only", default="", help="parts of deployments' names, such as deepseek-r1,ep16")
    options = parser.parse_args(arguments)
    if options.command == "report":
        lines = Journal(options.journal).lines
        print(markdown(lines))
        return 0 if holds(lines, selected(options.only)) else 1
    end = time.time() + options.seconds
    options.vllm = vllm_folder(options.vllm)
    os.environ[PACKAGED_VARIABLE] = "0"  # the profiles are those of the store alone
    left = {str(each): measure(each, options, end) for each in selected(options.only)}
    for name, reason in left.items():
        print(f"{name}: {reason or 'complete'}", file=sys.stderr)
    return 1 if any(left.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
