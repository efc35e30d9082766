"""Times SGLang's own MoE module on a GPU with its default, the file that it ships, and the file that moetune exports.

    python benchmarks/engine/sglang_module.py pack WHEEL FOLDER
    python benchmarks/engine/sglang_module.py measure OUT --sglang FOLDER
    python benchmarks/engine/sglang_module.py report OUT/sglang_module.jsonl

It is the module and not the engine: `fused_experts` of SGLang's wheel, which SGLang's layer calls for
`--moe-runner-backend triton`, with its own look-up of files. `sglang_sources.py` says what is replaced around it.

`measure` tunes what OUT/store lacks, and goes on where it was cut. All arms of a row count are timed in the same
interleaved rounds, in CUDA graphs, on routings that no tune has used. `report` prints Markdown. It exits 1 if moetune's
arm is slower beyond the noise, if SGLang's log does not prove what an arm read, if an output is wrong, or if a cell is
missing. README.md beside this file has the commands for a GPU host.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from common import Journal
from sglang_cells import CASES, ROWS, Case, Folders, cell_key, measure_case
from sglang_module_report import ARMS, markdown, problems
from sglang_sources import Module, load, pack, reading, version_of

import moetune
from moetune.backends.grouped_triton.engine_files import release, sglang_folder


def folders_of(case: Case, options: argparse.Namespace, device: str, shipped: Path) -> Folders:
    """Returns what the arms read. `moetune tune` measures what is not in OUT/store.

    Raises:
        SystemExit: moetune has written no file in which SGLang would look.
    """
    name, out = case.file_name(device), options.out.resolve()
    empty, tuned = out / "empty", out / "tuned" / case.name
    (empty / "configs").mkdir(parents=True, exist_ok=True)
    wanted = f"configs/{sglang_folder(release(importlib.metadata.version('triton')))}/{glob.escape(name)}"
    if not list(tuned.glob(f"**/{wanted}")):
        command = [sys.executable, "-m", "moetune", "tune", "--launch", case.launch, "--backend", "triton"]
        command += ["--kernel", options.kernel, "--store", str(out / "store"), "--export", str(tuned)]
        command += ["--for-version", version_of(options.sglang)]
        paths = [str(Path(moetune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        if options.kernel == "sglang":
            paths.insert(1, str(options.sglang))
        print(shlex.join(command), flush=True)
        subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}, check=False)
    found = sorted(tuned.glob(f"**/{wanted}"))
    if not found:
        raise SystemExit(f"moetune has written no {wanted} below {tuned}.")
    return Folders(empty, shipped, found[0].parents[2])


@cache
def _loaded(folder: Path, device: str) -> Module:
    return load(folder, device)


def compile_arm(folder: Path, device: str, case: str, rows: int, variable: Path | None) -> None:
    """Runs one arm at one row count once, so that Triton's cache has its kernels. Runs in a process of its own."""
    module = _loaded(folder, device)
    layer, regime = CASES[case].layer, CASES[case].regime
    shard, size = regime.shard(layer), regime.intermediate_size(layer)
    empty = partial(torch.empty, dtype=torch.bfloat16, device="cuda")
    settings = module.runner_config(num_experts=layer.num_experts, num_local_experts=shard.num_local, inplace=False)
    ids = torch.arange(rows * layer.top_k, dtype=torch.int32, device="cuda").view(rows, -1) % shard.num_local
    with reading(module, variable):
        module.fused_experts(
            empty(rows, layer.hidden_size),
            empty(shard.num_local, 2 * size, layer.hidden_size),
            empty(shard.num_local, layer.hidden_size, size),
            (torch.ones(ids.shape, device="cuda"), ids, None),
            settings,
        )
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def compile_ahead(options: argparse.Namespace, device: str, case: Case, folders: Folders, rows: Sequence[int]) -> None:
    """Compiles all arms' kernels in parallel. What fails here fails again, and is said, when it is measured."""
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        pending = [
            pool.submit(compile_arm, options.sglang, device, case.name, count, folders.variable(arm))
            for count in rows
            for arm in ARMS
        ]
        for future in pending:
            if error := future.exception():
                print(f"compiling: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                break


def measure(options: argparse.Namespace, cases: Sequence[Case], rows: Sequence[int]) -> list[str]:
    """Measures the cases one after the other. Returns a line for each that is not complete."""
    end = time.time() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out / "sglang_module.jsonl")
    device = torch.cuda.get_device_name()
    version = version_of(options.sglang)
    options.sglang = options.sglang.resolve()
    module = load(options.sglang, device)
    left = []
    for case in cases:
        if time.time() > end:
            left.append(f"{case.name}: the time is up")
            continue
        folders = folders_of(case, options, device, module.shipped)
        key = cell_key(case, folders, device, version)
        new = [count for count in rows if journal.find(**key, kind="cell", rows=count) is None]
        compile_ahead(options, device, case, folders, new)
        remaining = measure_case(case, module, folders, journal, end, where=device, sglang=version, rows=rows)
        if remaining:
            left.append(f"{case.name}: the time is up, {remaining} row counts are left")
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="unpack what is needed of SGLang's wheel into a folder")
    packing.add_argument("wheel", type=Path)
    packing.add_argument("folder", type=Path)
    measuring = commands.add_parser("measure", help="tune and measure what OUT lacks")
    measuring.add_argument("out", type=Path)
    measuring.add_argument("--sglang", type=Path, required=True, help="the folder that `pack` made")
    measuring.add_argument("--kernel", choices=("builtin", "sglang"), default="builtin", help="what the tune measures")
    measuring.add_argument("--seconds", type=float, default=420.0, help="begin nothing after this many seconds")
    measuring.add_argument("--workers", type=int, default=12, help="the number of processes that compile")
    reporting = commands.add_parser("report", help="print the journal as Markdown")
    reporting.add_argument("journal", type=Path)
    for command in (measuring, reporting):
        command.add_argument("--cases", default=",".join(CASES), help="comma-separated")
        command.add_argument("--rows", default=",".join(map(str, ROWS)), help="comma-separated row counts")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        print(f"{options.folder}: {pack(options.wheel, options.folder) / 2**20:.1f} MiB")
        return 0
    if unknown := set(options.cases.split(",")) - set(CASES):
        raise SystemExit(f"No case is named {', '.join(sorted(unknown))}. There are: {', '.join(CASES)}.")
    cases = [CASES[name] for name in options.cases.split(",")]
    rows = [int(count) for count in options.rows.split(",")]
    if options.command == "report":
        lines = Journal(options.journal).lines
        found = list(problems(lines, [case.name for case in cases], rows))
        print(markdown(lines, found))
        return 1 if found else 0
    left = measure(options, cases, rows)
    print("\n".join(left) or "All is measured.", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
