"""Turns the options of `option_table` into a layer and a regime."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from moetune.errors import UsageError
from moetune.inputs import presets
from moetune.inputs.hf import Reading
from moetune.inputs.option_table import OPTIONS, SIZES, Group, flag
from moetune.inputs.shell import MOST_CHARACTERS
from moetune.quoting import condensed, quoted
from moetune.spec.enums import DISPATCHES, ENGINE_TITLES, RANK_WORDS, RankWord
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

_SIZES = [option for option in OPTIONS if option.name in SIZES]
_REGIME = [option for option in OPTIONS if option.owner == "regime"]
_DEPLOYMENT = [option for option in OPTIONS if option.group is not Group.KERNELS]
"""The options that `MOETUNE_REGIME` can have. An engine chooses its kernels and its device itself."""


class Deployment(NamedTuple):
    """The layer and the regime that the options describe.

    `rank` is an argument for `workload.ranks.of_rank`. `warnings` come from the launch line, from the config and from
    the balancer's rule. `strict_skew` says whether a skew that is missed is an error; see `workload.achieved.miss`.
    """

    layer: MoELayer
    regime: Regime
    rank: RankWord | int | None
    warnings: tuple[str, ...] = ()
    strict_skew: bool = False


def parse(text: str) -> Deployment:
    """Reads options from one line of text, the value of `MOETUNE_REGIME`.

    Examples are `--model qwen3-235b-a22b --ep 8 --dispatch vllm:deepep_high_throughput` and `--launch "vllm serve …"`.
    Other options override `--launch`.

    Raises:
        UsageError: an option is unknown, a value is missing or invalid, there is no `--model`, or as `resolve`.
        UnsupportedError: as `launch.read`.
    """
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"Options have at most {MOST_CHARACTERS:,} characters, given {len(text):,}.")
    try:
        given = _parsed(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{quoted(text)} cannot be split into options: {error}.", "Close every quote.") from None
    line, strict = given.pop("launch"), bool(given.pop("strict_skew"))
    found = resolve(**given) if line is None else launched(line, given)[0]
    return found._replace(strict_skew=strict)


def launched(line: str, given: Mapping[str, Any]) -> tuple[Deployment, str | None]:
    """Returns the layer and the regime of a launch line and other options, and the backend that they select.

    Args:
        line: the command that starts an engine's server.
        given: options by name, which override the line. None means not given.

    Raises:
        UsageError: as `launch.read` or `resolve`.
        UnsupportedError: as `launch.read`.
    """
    from moetune.inputs import launch

    read = launch.read(line, given)
    options = {**given, **read.options}
    backend = options.pop("backend", None)
    found = resolve(**options)
    return found._replace(warnings=(*read.warnings, *found.warnings)), backend


def _parsed(words: list[str]) -> dict[str, Any]:
    """Returns the values of `_DEPLOYMENT` by name, parsed by click. An option that is not given has None."""
    options = [click.Option(list(option.declarations), **option.attributes) for option in _DEPLOYMENT]
    command = click.Command("MOETUNE_REGIME", params=[*options], add_help_option=False)
    try:
        params = command.make_context(None, words).params
        return {name: None if value == () else value for name, value in params.items()}
    except click.NoSuchOption as error:
        if error.option_name in {option.flag for option in OPTIONS}:
            raise UsageError(
                f"{error.option_name} cannot be given here: the engine chooses its kernels and its device itself.",
                "Leave the option out.",
            ) from None
        raise UsageError(condensed(error.format_message()), _known()) from None
    except click.UsageError as error:
        raise UsageError(condensed(error.format_message()), _known()) from None


def _known() -> str:
    return f"Options: {', '.join(option.flag for option in _DEPLOYMENT)}."


def layer_of(given: Mapping[str, Any]) -> MoELayer:
    """Returns the layer of `read_layer`, without the notes."""
    return read_layer(given).layer


def read_layer(given: Mapping[str, Any]) -> Reading:
    """Returns the layer that `model`, `precision` and the `SIZES` in `given` describe. None means not given.

    Raises:
        UsageError: there is neither a model nor all sizes, or as `presets.read`.
    """
    model, precision = given.get("model"), given.get("precision")
    sizes = {option.field: given[option.name] for option in _SIZES if given.get(option.name) is not None}
    base = None if model is None else presets.read(model, precision)
    if base is not None and not sizes:
        return base
    if base is None and len(sizes) < len(SIZES):
        present = [option.flag for option in _SIZES if option.field in sizes]
        raise UsageError(
            f"{', '.join(present)} given without --model." if present else "--model is missing.",
            f"Give a name from `moetune models` or the path of a config.json, or all of {', '.join(map(flag, SIZES))}.",
        )
    given_sizes: dict[str, Any] = {option.field: sizes.get(option.field) for option in _SIZES}
    layer = presets.layer_from_sizes(None if base is None else base.layer, precision=precision, **given_sizes)
    return Reading(layer, () if base is None else base.notes)


def resolve(model: str | None = None, **given: Any) -> Deployment:
    """Returns the layer and the regime that the options give.

    Args:
        model: the value of `--model`.
        given: the other options of a layer and a regime, by their names in `option_table`. None means not given.

    Raises:
        UsageError: a name is unknown, a value is out of range, or options exclude each other.
    """
    if unknown := given.keys() - {option.name for option in OPTIONS if option.owner in ("layer", "regime")}:
        raise UsageError(
            f"A layer and a regime have no option {', '.join(sorted(unknown))}.",
            f"Options: {', '.join(option.name for option in OPTIONS if option.owner in ('layer', 'regime'))}.",
        )
    layer, notes = read_layer({"model": model, **given})
    rank = _rank(given.get("rank"))
    fields = _dispatch(layer, given)
    for option in _REGIME:
        if option.name not in ("dispatch", "rank") and given.get(option.name) is not None:
            fields[option.field] = given[option.name]
    regime = Regime(**fields)
    regime.shard(layer, rank if isinstance(rank, int) else 0)
    return Deployment(layer, regime, rank, (*notes, *_eplb_warnings(layer, regime)))


def _eplb_warnings(layer: MoELayer, regime: Regime) -> tuple[str, ...]:
    """Returns what an engine's balancer may do otherwise than `workload.eplb.placement`."""
    if regime.eplb is None:
        return ()
    warnings = []
    title = ENGINE_TITLES[regime.eplb]
    if layer.routing.grouped and regime.eplb != "trtllm":
        warnings.append(
            f"{title}'s balancer first packs the router's groups to nodes if the nodes divide the groups. The copies "
            "are placed as on one node."
        )
    if regime.eplb == "sglang":
        warnings.append(
            "The copies are placed by load, as SGLang does with --enable-eplb or --init-expert-location. Without these "
            "flags it places them without regard to load."
        )
    return tuple(warnings)


def _rank(text: str | int | None) -> RankWord | int | None:
    if text is None or isinstance(text, int):
        return text
    for word in RANK_WORDS:
        if text == word:
            return word
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--rank must be {', '.join(RANK_WORDS)} or a number, given {quoted(text)}.") from None


def _dispatch(layer: MoELayer, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the regime fields that `--dispatch` sets. An engine's dispatcher also sets layout and ladder."""
    dispatch = given.get("dispatch")
    if dispatch is None:
        return {}
    if ":" in dispatch:
        from moetune.inputs import dispatcher

        ep, redundant, tp = given.get("ep") or 1, given.get("redundant_experts") or 0, given.get("tp") or 1
        return dict(dispatcher.resolve(dispatch, layer, ep, redundant, given.get("dp"), tp))
    if dispatch not in DISPATCHES:
        raise UsageError(
            f"--dispatch must be one of {', '.join(DISPATCHES)} or ENGINE:NAME, given {quoted(dispatch)}.",
            "Names are spelled like vllm:allgather_reducescatter, sglang:none or trtllm:attention_dp.",
        )
    return {"dispatch": dispatch}
