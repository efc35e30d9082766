"""The options that name a layer and a regime, for the command line and wherever else they are spelled."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from moetune.errors import UsageError
from moetune.inputs import presets
from moetune.inputs.hf import Reading
from moetune.spec.enums import DISPATCHES, RANK_WORDS, RankWord
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

SIZES = ("experts", "top_k", "hidden", "intermediate")
"""The options that give a layer's sizes: all four of a model that has no name here, or some in place of a preset's."""
TEXT = ("model", "precision", "dispatch", "layout", "rank", "distribution", "ladder")
NUMBERS = (*SIZES, "ep", "tp", "redundant_experts", "seed", "draws", "tune_max_num_tokens")


class Asked(NamedTuple):
    """What the options name; `rank` as `workload.ranks.of_rank` takes it. `warnings` are of the launch line and of the
    config."""

    layer: MoELayer
    regime: Regime
    rank: RankWord | int | None
    warnings: tuple[str, ...] = ()


def parse(spelled: str) -> Asked:
    """The question in one line: `--model qwen3-235b-a22b --ep 8 --dispatch vllm:deepep_high_throughput`.

    Or `--launch "vllm serve …"`; options beside it win.

    Raises:
        UsageError: no such option, one without its value, `--model` missing, or as for `resolve`.
        UnsupportedError: as for `launch.options`.
    """
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    for name in TEXT:
        parser.add_argument(_option(name))
    for name in NUMBERS:
        parser.add_argument(_option(name), type=int)
    parser.add_argument("--dp", action=argparse.BooleanOptionalAction)
    parser.add_argument("--launch")
    try:
        words = shlex.split(spelled)
    except ValueError as error:
        raise UsageError(f"{spelled!r} cannot be split into options: {error}.") from None
    given = vars(parser.parse_args(words))
    warnings: tuple[str, ...] = ()
    if (line := given.pop("launch")) is not None:
        from moetune.inputs import launch

        read = launch.read(line, given)
        given |= read.options
        warnings = read.warnings
        given.pop("backend", None)
    asked = resolve(**given)
    return asked._replace(warnings=(*warnings, *asked.warnings))


def layer_of(given: Mapping[str, Any]) -> MoELayer:
    """As `read_layer`, without its notes."""
    return read_layer(given).layer


def read_layer(given: Mapping[str, Any]) -> Reading:
    """The layer that `model`, `precision` and the `SIZES` of `given` name; None is an option that was not given.

    Raises:
        UsageError: neither a model nor all sizes, or as `presets.read`.
    """
    model, precision = given.get("model"), given.get("precision")
    sizes = {name: given[name] for name in SIZES if given.get(name) is not None}
    base = None if model is None else presets.read(model, precision)
    if base is not None and not sizes:
        return base
    if base is None and len(sizes) < len(SIZES):
        beside = f"{', '.join(_option(name) for name in sizes)} given without --model. " if sizes else ""
        raise UsageError(
            f"{beside}--model is missing.",
            "It takes a name of `moetune models` or a path to a config.json; or give "
            f"{', '.join(map(_option, SIZES))}, all of them.",
        )
    layer = presets.layer_from_sizes(
        None if base is None else base.layer,
        num_experts=sizes.get("experts"),
        top_k=sizes.get("top_k"),
        hidden_size=sizes.get("hidden"),
        intermediate_size=sizes.get("intermediate"),
        precision=precision,
    )
    return Reading(layer, () if base is None else base.notes)


def resolve(
    model: str | None = None,
    *,
    precision: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    ep: int | None = None,
    tp: int | None = None,
    dp: bool | None = None,
    dispatch: str | None = None,
    layout: str | None = None,
    rank: str | int | None = None,
    redundant_experts: int | None = None,
    distribution: str | None = None,
    seed: int | None = None,
    draws: int | None = None,
    ladder: str | None = None,
    tune_max_num_tokens: int | None = None,
) -> Asked:
    """The layer and the regime that the options name; None is an option that was not given.

    Raises:
        UsageError: an unknown name, a value out of range, or options that exclude each other.
    """
    layer, notes = read_layer(
        {
            "model": model,
            "precision": precision,
            "experts": experts,
            "top_k": top_k,
            "hidden": hidden,
            "intermediate": intermediate,
        }
    )
    given = {
        "ep_size": ep,
        "tp_size": tp,
        "attention_dp": dp,
        "layout": layout,
        "redundant_experts": redundant_experts,
        "distribution": distribution,
        "seed": seed,
        "draws": draws,
        "ladder": ladder,
        "tune_max_num_tokens": tune_max_num_tokens,
    }
    explicit = {name: value for name, value in given.items() if value is not None}
    regime = Regime(**{**_dispatch(dispatch, layer, ep, redundant_experts, dp, tp), **explicit})
    asked = _rank(rank)
    regime.shard(layer, asked if isinstance(asked, int) else 0)
    return Asked(layer, regime, asked, notes)


def _rank(spelled: str | int | None) -> RankWord | int | None:
    if spelled is None or isinstance(spelled, int):
        return spelled
    for word in RANK_WORDS:
        if spelled == word:
            return word
    try:
        return int(spelled)
    except ValueError:
        raise UsageError(f"--rank must be {', '.join(RANK_WORDS)} or a number, given {spelled!r}.") from None


def _dispatch(
    dispatch: str | None,
    layer: MoELayer,
    ep: int | None,
    redundant_experts: int | None,
    dp: bool | None,
    tp: int | None,
) -> dict[str, Any]:
    """The fields of a regime that `--dispatch` stands for."""
    if dispatch is None:
        return {}
    if ":" in dispatch:
        from moetune.inputs import dispatcher

        return dict(dispatcher.resolve(dispatch, layer, ep or 1, redundant_experts or 0, dp, tp or 1))
    if dispatch not in DISPATCHES:
        raise UsageError(
            f"--dispatch must be one of {', '.join(DISPATCHES)} or ENGINE:WORD, given {dispatch!r}.",
            "An engine's word is spelled like vllm:allgather_reducescatter, sglang:none or trtllm:attention_dp.",
        )
    return {"dispatch": dispatch}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.", f"Options: {self.format_usage().strip()}")
