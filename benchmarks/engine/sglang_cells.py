"""The cells of `sglang_module.py`: SGLang's module at one row count, timed in each arm, and the proof of the arms."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from common import Journal, series_us
from sglang_module_report import ARMS
from sglang_sources import REPLACED, Module, reading

from moetune.backends.base import Problem
from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.backends.grouped_triton.runner import TritonRunner
from moetune.backends.grouped_triton.weights import TritonExperts, random_experts
from moetune.backends.reference import relative_error
from moetune.export.engine_log import parsed_log
from moetune.inputs.options import parse
from moetune.measure.clock import clock_for
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
UNSEEN: Final = 100_000
"""No tune uses the draws from this number on."""
ROUNDS: Final = 5
"""The interleaved rounds on each draw."""
SERVER: Final = "python -m sglang.launch_server --moe-runner-backend triton"


@dataclass(frozen=True)
class Case:
    """A deployment by SGLang's launch line."""

    name: str
    launch: str

    @property
    def layer(self) -> MoELayer:
        return parse(f'--launch "{self.launch}"').layer

    @property
    def regime(self) -> Regime:
        return parse(f'--launch "{self.launch}"').regime

    def file_name(self, device: str) -> str:
        """Returns the name of the file in which SGLang looks."""
        layer, regime = self.layer, self.regime
        return ConfigFile.of(layer, regime, device, regime.shard(layer).num_local).sglang_name()


_CASES: Final = (
    Case("qwen3-30b-ep1", f"{SERVER} --model-path Qwen/Qwen3-30B-A3B"),
    Case("qwen3-235b-ep8", f"{SERVER} --model-path Qwen/Qwen3-235B-A22B --tp 8 --ep 8"),
)
CASES: Final[Mapping[str, Case]] = {case.name: case for case in _CASES}


@dataclass(frozen=True)
class Folders:
    """The values of `SGLANG_MOE_CONFIG_DIR` of the arms. `shipped` is the folder that is read if it is unset."""

    default: Path
    shipped: Path
    moetune: Path

    def variable(self, arm: str) -> Path | None:
        """Returns the variable's value; None if it is unset."""
        folder: Path = getattr(self, arm)
        return None if arm == "shipped" else folder


class Cell:
    """SGLang's module at one row count of a case, with moetune's weights, inputs and routings.

    Args:
        module: SGLang's module.
        problem: the layer, the rank's shard and the routings.
        experts: the rank's weights.
    """

    def __init__(self, module: Module, problem: Problem, experts: TritonExperts) -> None:
        layer, shard = problem.layer, problem.shard
        self._module, self._experts = module, experts
        self._runner = TritonRunner(problem, experts, "builtin", zero_remote=True)
        self._inputs = []
        for draw in range(len(problem.draws)):
            x, ids, weights = self._runner.inputs(draw)
            self._inputs.append((x, weights, local_ids(ids, shard.first, shard.num_local)))
        self.settings = module.runner_config(
            num_experts=layer.num_experts,
            num_local_experts=shard.num_local,
            hidden_size=layer.hidden_size,
            intermediate_size_per_partition=problem.intermediate_size,
            top_k=layer.top_k,
            inplace=False,
        )

    def run(self, folder: Path | None, draw: int) -> torch.Tensor:
        """Returns the module's output on a draw, with the configuration that it looks up in the folder."""
        x, weights, ids = self._inputs[draw]
        with reading(self._module, folder):
            return self._module.fused_experts(
                x, self._experts.w1.values, self._experts.w2.values, (weights, ids, None), self.settings
            )

    def error(self, folder: Path | None, draw: int = 0) -> float:
        """Returns the output's relative error against the reference in fp32."""
        return relative_error(self.run(folder, draw), self._runner.reference(draw))

    def configs(self, folder: Path | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Returns the configurations of both GEMMs as SGLang chooses them; None: the second has the first's."""
        x, _, ids = self._inputs[0]
        with reading(self._module, folder):
            first, (second, _) = self._module.config.try_get_optimal_moe_config(
                self._experts.w1.values.shape,
                self._experts.w2.values.shape,
                ids.shape[1],
                None,
                len(x),
                return_down_config=True,
            )
        return dict(first), dict(second) if second else None


def num_draws(rows: int) -> int:
    """Returns how many unseen draws a cell has. Small draws differ more from each other and take less time."""
    return 16 if rows <= 512 else 8


def local_ids(ids: torch.Tensor, first: int, num_local: int) -> torch.Tensor:
    """Returns ids as SGLang's dispatcher `none` gives them to the module: local, or −1 for another rank's expert."""
    local = ids - first
    return torch.where((local >= 0) & (local < num_local), local, -1).to(torch.int32)


@contextmanager
def logged(module: Module) -> Iterator[list[str]]:
    """Collects what SGLang's look-up logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    module.config.logger.addHandler(handler)
    try:
        yield lines
    finally:
        module.config.logger.removeHandler(handler)


def read_by_sglang(module: Module, folder: Path | None, experts: int, size: int) -> dict[int, Any] | None:
    """Returns what SGLang's own `get_moe_configs` reads for a bf16 layer; None if there is no file."""
    with reading(module, folder):
        rows: dict[int, Any] | None = module.config.get_moe_configs(experts, size, None, 0, 0)
    return rows


def missing_proof(arm: str, name: str, lines: Sequence[str], folder: Path, rows: Mapping[int, Any] | None) -> list[str]:
    """Returns what is missing to prove that an arm read its file and nothing else; nothing if it is proved.

    Args:
        arm: its name.
        name: the name of the file for the shape.
        lines: what SGLang logged while the layer ran.
        folder: where SGLang has to look.
        rows: what `get_moe_configs` returned.
    """
    said = parsed_log("\n".join(lines)).of(name)
    wanted = {"default": ("default",), "shipped": ("read", "other_triton"), "moetune": ("read",)}[arm]
    if said is None or said.event not in wanted:
        found = said.event if said else "nothing"
        return [f"a log line of SGLang that says {' or '.join(wanted)} for {name}; it says {found}"]
    missing = []
    if not said.path.startswith(f"{folder}/configs/"):
        missing.append(f"that SGLang looked in {folder}; its log names {said.path}")
    elif arm == "default":
        if rows is not None:
            missing.append("that get_moe_configs returns None")
    elif rows != {int(key): value for key, value in json.loads(Path(said.path).read_text()).items()}:
        missing.append(f"that get_moe_configs returns the rows of {said.path}")
    return missing


def measure_cell(
    cell: Cell, module: Module, folders: Folders, arms: Sequence[str], name: str, draws: int, device: str
) -> dict[str, Any]:
    """Times the arms at one row count in interleaved rounds; moetune's arm is timed twice.

    Args:
        cell: the layer.
        module: SGLang's module.
        folders: what the arms read.
        arms: the arms' names; `moetune` is one of them.
        name: the name of the file for the shape.
        draws: the number of the cell's draws.
        device: the torch device.

    Returns:
        `arms`: by name the µs on each draw, the configurations of both GEMMs, the output's error, SGLang's log lines
        and what they do not prove. `again_us`: moetune's second series. `eager`: calls that no graph could capture.
    """
    experts, size = cell.settings.num_local_experts, cell.settings.intermediate_size_per_partition
    found: dict[str, dict[str, Any]] = {}
    calls: list[Callable[[int], object]] = []
    for arm in arms:
        variable = folders.variable(arm)
        with logged(module) as lines:
            cell.run(variable, 0)
        rows = read_by_sglang(module, variable, experts, size)
        first, second = cell.configs(variable)
        found[arm] = {
            "config": first,
            "down": second,
            "error": cell.error(variable),
            "log": list(dict.fromkeys(lines)),
            "missing": missing_proof(arm, name, lines, getattr(folders, arm), rows),
        }
        calls.append(partial(cell.run, variable))
    clock = clock_for(device)
    again = partial(cell.run, folders.variable("moetune"))
    series = series_us([*calls, again], list(range(draws)) * ROUNDS, clock)
    by_draw = [[round(statistics.median(of[at::draws]), 3) for at in range(draws)] for of in series]
    for arm, us in zip(arms, by_draw, strict=False):
        found[arm]["us"] = us
    return {"arms": found, "again_us": by_draw[-1], "eager": sorted(set(clock.eager.values()))}


def measure_case(
    case: Case,
    module: Module,
    folders: Folders,
    journal: Journal,
    end: float,
    *,
    where: str,
    sglang: str,
    rows: Sequence[int] = ROWS,
    device: str = "cuda",
) -> int:
    """Measures the cells that the journal lacks, and adds a line for each. Returns how many are left.

    Args:
        case: the deployment.
        module: SGLang's module.
        folders: what the arms read.
        journal: where the lines are added.
        end: when to begin no more cells, in seconds since the epoch.
        where: the GPU's name.
        sglang: SGLang's version.
        rows: the row counts.
        device: the torch device.
    """
    name, layer, regime = case.file_name(where), case.layer, case.regime
    key = cell_key(case, folders, where, sglang)
    left = [count for count in rows if journal.find(**key, kind="cell", rows=count) is None]
    shard = regime.shard(layer)
    shipped = read_by_sglang(module, None, shard.num_local, regime.intermediate_size(layer))
    arms = [arm for arm in ARMS if arm != "shipped" or shipped is not None]
    experts = None
    for done, count in enumerate(left):
        if time.time() > end:
            return len(left) - done
        draws = num_draws(count)
        routings = [realize(layer, regime, count, None, UNSEEN + draw) for draw in range(draws)]
        problem = Problem(layer, regime, count, shard, as_draws(routings), device)
        experts = experts or random_experts(problem)
        cell = Cell(module, problem, experts)
        found = measure_cell(cell, module, folders, arms, name, draws, device)
        versions = {package: importlib.metadata.version(package) for package in ("torch", "triton")}
        journal.add(
            **key, kind="cell", rows=count, **versions, replaced=REPLACED, measured_at=time.strftime("%Y-%m-%d"),
            **found,
        )  # fmt: skip
        medians = {arm: f"{statistics.fmean(of['us']):.1f} µs" for arm, of in found["arms"].items()}
        print(f"{case.name} {count} rows: {medians}", flush=True)
        del cell
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return 0


def cell_key(case: Case, folders: Folders, where: str, sglang: str) -> dict[str, str]:
    """Returns what identifies the cells of a case in the journal, with a digest of moetune's file."""
    (path,) = folders.moetune.glob(f"configs/*/{glob.escape(case.file_name(where))}")
    tuned = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return {"case": case.name, "device": where, "sglang": sglang, "tuned": tuned}
