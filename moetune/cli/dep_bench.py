"""Defines the command `moetune dep-bench`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Command
from moetune.cli.options import Request, json_option, store_option, takes_request
from moetune.cli.output import document, line, show
from moetune.errors import UsageError
from moetune.quoting import quoted

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.dep_bench.result import DepBench, Point
    from moetune.spec.regime import Regime
    from moetune.store.profile import Profile
    from moetune.workload.wire import WireActivation, WireRouting

EXAMPLE = """\
torchrun --nproc-per-node 2 -m moetune dep-bench --model qwen3-30b-a3b
  --ep 2 --dispatch vllm:allgather_reducescatter --backend triton"""


@click.command("dep-bench", cls=Command, example=EXAMPLE)
@takes_request()
@store_option
@click.option("--tokens", metavar="T,…", help="The batch sizes of one GPU.  [default: 8,16,32, … 2048]")
@click.option(
    "--routing",
    "routings",
    metavar="DISTRIBUTION",
    multiple=True,
    help="How the router chooses experts: random, ddist:X, zipf:S or powerlaw:A. It can be repeated.  [default: random "
    "and zipf:0.5]",
)
@click.option(
    "--wire",
    type=click.Choice(("bf16", "fp4")),
    default="bf16",
    help="The format of hidden states on the wire. fp4 quantizes them before they travel.  [default: bf16]",
)
@click.option(
    "--wire-routing",
    type=click.Choice(("logits", "topk", "packed_topk")),
    help="The format of the routing on the wire.  [default: logits in an all-gather, topk in an all-to-all]",
)
@click.option("--seconds", type=float, metavar="S", help="Start no batch size after S seconds.  [default: no limit]")
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep finished batch sizes in this file, and do not measure them again.",
)
@json_option
def dep_bench(
    request: Request,
    store: Path | None,
    tokens: str | None,
    routings: tuple[str, ...],
    wire: WireActivation,
    wire_routing: WireRouting | None,
    seconds: float | None,
    journal: Path | None,
    as_json: bool,
) -> None:
    """Measure a real MoE block over the GPUs of this host with the tactics of each tuner.

    Started by torchrun with 2 to 8 processes, each GPU is one expert-parallel rank with tokens of its own: router,
    top-k, dispatch over NCCL, local experts, combine. The output is checked. With one process, the GPU stands for one
    rank of --ep, and the simulated router makes the rows that reach it.

    The tactics are those of no tuner, of the engine's own tuner, of moetune without attention DP, and of moetune for
    this dispatcher. The tables have the tokens per second and GPU of the slowest rank. Profiles that the store lacks
    are tuned first. docs/dep-bench.md explains the tables.
    """
    from moetune.cli.streams import stdout_on_stderr
    from moetune.dep_bench.process_group import joined
    from moetune.dep_bench.run import ROUTINGS, TOKENS
    from moetune.dep_bench.run import dep_bench as measured

    with ExitStack() as until_printed:
        with stdout_on_stderr():
            ranks = until_printed.enter_context(joined(request.device))
            result = measured(
                request.layer,
                request.regime,
                request.backend,
                _another(request.backend),
                ranks,
                partial(_tuned, request, store, ranks.device),
                tokens=TOKENS if tokens is None else _counts(tokens),
                routings=routings or ROUTINGS,
                activation=wire,
                wire_routing=wire_routing,
                seconds=seconds,
                journal=journal,
                on_point=_say,
            )
        if ranks.leads:
            _print(result, as_json)


def _print(result: DepBench, as_json: bool) -> None:
    if as_json:
        document(result)
        return
    from moetune.dep_bench.report import dep_bench_report

    show(*dep_bench_report(result))


def _tuned(request: Request, store: Path | None, device: str, regime: Regime) -> Profile:
    """Returns moetune's profile of a regime: the stored one, or a new one."""
    from moetune.cli.progress import Progress
    from moetune.store.store import Store
    from moetune.tuning.tune import tune

    with Progress() as progress:
        return tune(request.layer, regime, request.backend, Store(store), device=device, on_event=progress)


def _another(backend: Backend) -> Backend:
    """Returns a copy of a backend that shares no weights with it."""
    import pickle

    copied: Backend = pickle.loads(pickle.dumps(backend))
    return copied


def _say(point: Point) -> None:
    arm = point.arm("dispatcher")
    speed = "" if arm is None else f": {arm.tokens_per_s:,.0f} tokens/s per GPU"
    line(f"{point.tokens:,} tokens, {point.routing}{speed}", err=True)


def _counts(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--tokens must be batch sizes, given {quoted(text)}.", "Write them like 8,64,512.")
    return tuple(dict.fromkeys(int(word) for word in words))
