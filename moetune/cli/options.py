"""The options that name a question, shared by the commands, and what they mean."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetune.errors import UsageError
from moetune.spec.enums import (
    DEFAULT_TUNE_MAX_NUM_TOKENS,
    DISPATCHES,
    DISTRIBUTION_VARIABLE,
    DISTRIBUTIONS,
    LAYOUTS,
    Precision,
)

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.spec.enums import RankWord
    from moetune.spec.layer import MoELayer
    from moetune.spec.regime import Regime

KERNELS = ("builtin", "vllm", "sglang")
REMOTES = ("drop", "zero")


@dataclass(frozen=True, slots=True)
class Question:
    """What a command is asked. Of `auto` the first able backend is `backend`; `auto` says that it stands for all.

    `regime` has the rank that is measured; `rank` is what was asked. `engine` is the one whose dispatcher was named, as
    `vllm`.
    """

    layer: MoELayer
    regime: Regime
    backend: Backend
    rank: RankWord | int | None
    auto: bool = False
    engine: str | None = None


def _default(value: int) -> str:
    return f"  [default: {value}]"


_QUESTION_OPTIONS = (
    click.option(
        "--launch",
        metavar="LINE",
        help="An engine's launch line, as 'vllm serve …', in place of the options below; those beside it win.",
    ),
    click.option("--model", metavar="NAME|PATH", help="A name of `moetune models`, or a Hugging Face config.json."),
    click.option("--experts", type=int, metavar="N", help="The layer's experts, in place of the model's."),
    click.option("--top-k", type=int, metavar="N", help="Experts of a token, in place of the model's."),
    click.option("--hidden", type=int, metavar="N", help="The hidden size, in place of the model's."),
    click.option("--intermediate", type=int, metavar="N", help="The experts' intermediate size, likewise."),
    click.option("--precision", type=click.Choice(list(map(str, Precision))), help="Of the weights; the model's own."),
    click.option("--ep", type=int, metavar="N", help="Ranks that share the experts." + _default(1)),
    click.option("--tp", type=int, metavar="N", help="Ranks that share each expert." + _default(1)),
    click.option(
        "--dp/--no-dp", default=None, help="Whether each rank has tokens of its own (attention DP).  [default: no-dp]"
    ),
    click.option(
        "--dispatch",
        metavar="|".join((*DISPATCHES, "ENGINE:WORD")),
        help="How tokens travel: in moetune's words, or in an engine's as vllm:deepep_high_throughput.",
    ),
    click.option("--layout", type=click.Choice(LAYOUTS), help="How rows of an all-to-all arrive.  [default: packed]"),
    click.option(
        "--rank",
        metavar="mean|fullest|R",
        help="The rank that is measured for all: of the load nearest the mean, of the most load, or number R.  "
        "[default: mean; fullest where shards are uneven]",
    ),
    click.option("--redundant-experts", type=int, metavar="N", help="Replicated experts." + _default(0)),
    click.option(
        "--distribution",
        metavar="|".join(DISTRIBUTIONS),
        help=f"The dummy routing.  [default: ${DISTRIBUTION_VARIABLE}, else random]",
    ),
    click.option("--seed", type=int, metavar="N", help="Of the dummy routing." + _default(0)),
    click.option("--draws", type=int, metavar="N", help="Draws that are timed.  [default: 16, where balanced 1]"),
    click.option("--ladder", metavar="pow2|hybrid|vllm|1,2,4", help="The row counts to tune.  [default: pow2]"),
    click.option(
        "--tune-max-num-tokens",
        type=int,
        metavar="N",
        help="The largest bucket." + _default(DEFAULT_TUNE_MAX_NUM_TOKENS),
    ),
    click.option(
        "--backend",
        metavar="auto|NAME",
        help="The kernels; see `moetune doctor`. `tune` takes auto as all.  [default: auto]",
    ),
    click.option(
        "--kernel", type=click.Choice(KERNELS), help="Whose grouped GEMM backend triton times.  [default: builtin]"
    ),
    click.option(
        "--remote",
        type=click.Choice(REMOTES),
        help="What becomes of slots of other ranks' experts.  [default: zero with sglang's kernel or words, else drop]",
    ),
)
_NAMES = (
    "model", "experts", "top_k", "hidden", "intermediate", "precision", "ep", "tp", "dp", "dispatch", "layout",
    "rank", "redundant_experts", "distribution", "seed", "draws", "ladder", "tune_max_num_tokens", "backend",
    "kernel", "remote",
)  # fmt: skip

store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder of profiles.  [default: $MOETUNE_STORE, else the user's cache folder]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One versioned JSON document on stdout.")


def asks(*, required: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of a question and calls it with `question`.

    Args:
        required: whether `--model` must be given; where not, `question` is None without it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            asked = {name: given.pop(name) for name in _NAMES}
            if (line := given.pop("launch")) is not None:
                asked |= _launch(line, asked)
            command(question=_parse(required, **asked), **given)

        wrapped: Callable[..., None] = called
        for option in reversed(_QUESTION_OPTIONS):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def _launch(line: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What an engine's launch line stands for where no option beside it does; --kernel and --remote are triton's."""
    from moetune.inputs import launch

    of_triton = asked["kernel"] is not None or asked["remote"] is not None
    found = launch.read(line, {**asked, "backend": asked["backend"] or ("triton" if of_triton else None)})
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    return found.options


def _parse(required: bool, **asked: Any) -> Question | None:
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
    if not required and not given:
        return None
    if asked["model"] is None and asked["experts"] is None:
        about = f"{', '.join(given)} given without --model." if given else "--model is missing."
        raise UsageError(
            about,
            "It takes a name of `moetune models` or a path to a config.json; "
            "--experts, --top-k, --hidden and --intermediate do without.",
        )
    return ask(**asked)


def ask(
    model: str | None = None,
    *,
    backend: str | None = None,
    kernel: str | None = None,
    remote: str | None = None,
    **asked: Any,
) -> Question:
    """The layer, the regime and the backend that the options name; None is an option that was not given.

    Args:
        model, asked: as `spec.options.resolve` takes them.
        backend: a name, or `auto`.
        kernel, remote: of the triton backend.

    Raises:
        UsageError: an unknown name, a value out of range, or options that exclude each other.
    """
    from moetune.backends.registry import AUTO
    from moetune.inputs.options import resolve
    from moetune.workload.ranks import of_rank

    layer, regime, rank, warnings = resolve(model, **asked)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    regime = regime.with_default_distribution(os.environ.get(DISTRIBUTION_VARIABLE))
    regime = of_rank(layer, regime, rank)
    if asked.get("dp") and asked.get("dispatch") is None and asked.get("layout") is None:
        _say_what_dp_means(regime)
    engine = (asked.get("dispatch") or "").partition(":")[0] if ":" in (asked.get("dispatch") or "") else None
    if backend == "triton" and kernel is None and remote is None:
        remote = remote_of(engine)
    of_triton = {name: value for name, value in (("kernel", kernel), ("remote", remote)) if value is not None}
    chosen, auto = _backend(backend or AUTO, of_triton, layer, regime), backend in (None, AUTO) and not of_triton
    question = Question(layer, regime, chosen, rank, auto, engine)
    _say_what_the_engine_prefers(question)
    return question


def remote_of(engine: str | None) -> str | None:
    """`--remote` where it is not given: what the engine's own Triton kernel does; None is the backend's default."""
    return "zero" if engine == "sglang" else None


def _say_what_the_engine_prefers(question: Question) -> None:
    """Names the kernels that the engine would take before those of `triton`, before any time is spent on these."""
    from moetune.inputs.engine_flags import engine_flags, preferred_to_triton

    if question.engine is None or question.auto or question.backend.name != "triton":
        return
    precision, ep_size = question.layer.precision, question.regime.ep_size
    for capability, name in ((9, "Hopper"), (10, "Blackwell")):
        first = preferred_to_triton(question.engine, precision, ep_size, capability)
        if first and _may_have(capability):
            flag = engine_flags("triton", precision)[question.engine]
            click.echo(
                f"note: for {precision.value} experts at EP {ep_size} on {name} {question.engine} prefers {first} to "
                f"Triton; give it {flag}, or it reads no Triton file.",
                err=True,
            )


def _may_have(capability: int) -> bool:
    """Whether the GPU here has this major compute capability, or there is none here that could tell."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == capability


def _backend(name: str, of_triton: dict[str, str], layer: MoELayer, regime: Regime) -> Backend:
    """The backend, `auto` resolved: triton where an option of it is given, else `registry.preferred`."""
    from moetune.backends import registry

    if name != registry.AUTO:
        return registry.backend(name, **of_triton)
    if of_triton:
        return registry.backend("triton", **of_triton)
    return registry.preferred(layer, regime)


def _say_what_dp_means(regime: Regime) -> None:
    from moetune.inputs import dispatcher

    engines = dispatcher.bringing(regime.dispatch, regime.layout)
    note = f"note: --dp alone means --dispatch {regime.dispatch} --layout {regime.layout}"
    note += f", as {', '.join(engines)} brings it." if engines else "."
    if not any(word.startswith(("vllm:", "sglang:")) for word in engines):
        note += (
            " No dispatcher of vLLM or SGLang brings such rows; name yours: --dispatch vllm:allgather_reducescatter, "
            "vllm:deepep_high_throughput or sglang:none, or give the whole line as --launch 'vllm serve …'."
        )
    click.echo(note, err=True)
