"""Gives a command the options that describe a layer and its deployment, and turns them into a `Request`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetune.cli.output import report
from moetune.errors import UsageError
from moetune.inputs.option_table import OPTIONS, SIZES, flag
from moetune.quoting import condensed

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.inputs.launch import Launch
    from moetune.spec.enums import RankWord
    from moetune.spec.layer import MoELayer
    from moetune.spec.regime import Regime

_BACKEND_FIELDS = {option.name: option.field for option in OPTIONS if option.owner == "backend" and option.field}
"""The options that set one option of a backend, such as `kernel`."""

store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder of profiles. In DIR:SHARED:… the first is written, and all are read in this order.  [default: "
    "$MOETUNE_STORE, otherwise the user's cache folder]",
)
near_option = click.option(
    "--near",
    is_flag=True,
    help="If no profile matches, take one of the same layer, deployment and GPU that was measured with other versions, "
    "such as Triton's. One of another deployment is never taken.",
)
device_name_option = click.option(
    "--device-name",
    metavar="NAME",
    help="Look profiles up for this GPU, such as 'NVIDIA H200', which need not be here, whatever torch and Triton they "
    "were measured with.  [default: the device here]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write one versioned JSON document to stdout.")


_DEVICE = next(option for option in OPTIONS if option.name == "device")
device_option = click.option(*_DEVICE.declarations, **_DEVICE.attributes)


@dataclass(frozen=True, slots=True)
class Request:
    """What the options of one command describe. `Question` adds the store and the environment.

    Args:
        layer: the layer.
        regime: the regime. Its `rank` is the one to measure.
        backend: the backend; for `--backend auto` the first that can run here.
        rank: the value of `--rank`.
        auto: whether the backend was left to moetune.
        engine: the engine whose dispatcher was given, such as `vllm`.
        device: the value of `--device`.
        device_name: the name of the device to look profiles up for, if it is not the one here.
        flags: the flags of a launch line that decide the deployment; see `inputs.launch.Launch`.
        launch: the launch line.
    """

    layer: MoELayer
    regime: Regime
    backend: Backend
    rank: RankWord | int | None
    auto: bool = False
    engine: str | None = None
    device: str | None = None
    device_name: str | None = None
    flags: tuple[str, ...] = ()
    launch: str | None = None


def takes_request(*, required: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds these options to a command and calls it with their `request`.

    Args:
        required: whether a layer must be given. If not, `request` is None when no option is given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            options = {option.name: given.pop(option.name) for option in OPTIONS}
            command(request=_request(options, required), **given)

        wrapped: Callable[..., None] = called
        for option in reversed(OPTIONS):
            wrapped = click.option(*option.declarations, **option.attributes)(wrapped)
        return wrapped

    return decorate


def request_of_words(words: Sequence[str]) -> Request:
    """Returns the request of words such as `--model deepseek-r1 --ep 8`, and prints notes and warnings on stderr.

    Raises:
        UsageError: an option is unknown, a value is missing or invalid, or as `request_of`.
    """
    options = [click.Option(list(option.declarations), **option.attributes) for option in OPTIONS]
    command = click.Command("job", params=[*options], add_help_option=False)
    try:
        given = dict(command.make_context(None, list(words)).params)
    except click.UsageError as error:
        message = condensed(error.format_message())
        raise UsageError(message, "`moetune plan --help` lists the options of a question.") from None
    request = _request(given, True)
    assert request is not None
    return request


def _request(options: dict[str, Any], required: bool) -> Request | None:
    device = options.pop("device")
    line = options.pop("launch")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    launch = None if line is None else _launch(line, given)
    from_line = launch.options if launch else {}
    given |= from_line
    if not given and not required:
        return None
    if "model" not in given and not any(size in given for size in SIZES):
        flags = ", ".join(map(flag, given))
        raise UsageError(
            f"{flags} given without --model." if given else "--model is missing.",
            "Give a name from `moetune models` or the path of a config.json, or all of "
            f"{', '.join(map(flag, SIZES))}, or --launch 'vllm serve …'.",
        )
    request = request_of(**given, device=device)
    if request.engine:
        from moetune.cli import notes

        deployed = (request.engine, request.backend, request.layer, request.regime)
        for warning in notes.other_kernel(request.engine, request.backend):
            report(warning)
        if not request.auto and "backend" not in from_line:  # a line that selects kernels starts them itself
            for note in notes.preferred_kernels(*deployed):
                report(note)
    if launch is None:
        return request
    from moetune.inputs.launch import LARGEST_BUCKET

    largest = launch.options.get("tune_max_num_tokens")
    without = LARGEST_BUCKET if largest is not None and largest != request.regime.tune_max_num_tokens else ()
    return replace(request, flags=tuple(flag for flag in launch.flags if not flag.startswith(without)), launch=line)


def _launch(line: str, given: dict[str, Any]) -> Launch:
    """Returns what an engine's launch line sets and is not in `given`, and prints its warnings on stderr."""
    from moetune.cli.backend_choice import owners
    from moetune.inputs import launch

    beside = dict(given)
    if (own := _backend_options(given)) and len(having := owners(own)) == 1:
        beside.setdefault("backend", having[0])
    found = launch.read(line, beside)
    for warning in found.warnings:
        report(f"warning: {warning}")
    return found


def _backend_options(given: dict[str, Any]) -> dict[str, str]:
    """Returns what `given` sets of the backend's own options, as text by name."""
    from moetune.cli.backend_choice import read_pairs

    named = {field: given[name] for name, field in _BACKEND_FIELDS.items() if given.get(name) is not None}
    return read_pairs(given.get("backend_option") or (), named)


def request_of(
    model: str | None = None, *, backend: str | None = None, device: str | None = None, **given: Any
) -> Request:
    """Returns the request that the options describe, and prints notes and warnings on stderr.

    Args:
        model: as `inputs.options.resolve` takes it.
        backend: a backend's name, or `auto`.
        device: `cpu`, `cuda` or `cuda:N`.
        given: the other options by their names in `inputs.option_table`. None means not given.

    Raises:
        UsageError: an unknown name, a value out of range, or options that exclude each other.
    """
    from moetune.cli import notes
    from moetune.cli.backend_choice import choose
    from moetune.inputs.options import resolve
    from moetune.tuning.question import resolved

    strict_skew = given.pop("strict_skew", None)
    own = _backend_options(given)
    rest = {name: value for name, value in given.items() if name not in _BACKEND_FIELDS and name != "backend_option"}
    layer, regime, rank, warnings, _ = resolve(model, **rest)
    for warning in warnings:
        report(f"warning: {warning}")
    layer, regime = resolved(layer, regime, rank)
    _check_skew(layer, regime, strict=bool(strict_skew))
    dispatch = given.get("dispatch") or ""
    if given.get("dp") and not dispatch and given.get("layout") is None:
        report(notes.dp_alone(regime))
    engine = dispatch.partition(":")[0] if ":" in dispatch else None
    chosen, auto = choose(backend, own, engine, layer, regime)
    return Request(layer, regime, chosen, rank, auto, engine, device)


def _check_skew(layer: MoELayer, regime: Regime, *, strict: bool) -> None:
    """Prints a warning if the asked skew is missed, or raises UsageError if it is `strict`."""
    if not any(part.skew for part in regime.parts):
        return
    from moetune.workload.achieved import miss

    for part in regime.parts:
        error = miss(layer, part, simulate=strict)
        if error and strict:
            raise error
        if error:
            report(f"warning: {error.message} {error.hint}")
