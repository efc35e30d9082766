"""The options that name a layer and a regime, for the command line and wherever else they are spelled."""

from __future__ import annotations

import argparse
import shlex
from typing import Any, NamedTuple, NoReturn

from moetune.errors import UsageError
from moetune.inputs import presets
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.words import DISPATCHES

TEXT = ("model", "precision", "dispatch", "layout", "distribution", "ladder")
NUMBERS = ("ep", "tp", "rank", "redundant_experts", "seed", "draws", "tune_max_num_tokens")


class Asked(NamedTuple):
    """What the options name; `rank` is None where it was not given."""

    layer: MoELayer
    regime: Regime
    rank: int | None


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
    if (line := given.pop("launch")) is not None:
        from moetune.inputs import launch

        given |= launch.options(line, given)
        given.pop("backend", None)
    if given["model"] is None:
        raise UsageError("--model is missing.", "It takes a name of `moetune models` or a path to a config.json.")
    return resolve(**given)


def resolve(
    model: str,
    *,
    precision: str | None = None,
    ep: int | None = None,
    tp: int | None = None,
    dp: bool | None = None,
    dispatch: str | None = None,
    layout: str | None = None,
    rank: int | None = None,
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
    layer = presets.layer(model, precision)
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
    regime = Regime(**{**_dispatch(dispatch, layer, ep, redundant_experts, dp), **explicit})
    regime.shard(layer, rank or 0)
    return Asked(layer, regime, rank)


def _dispatch(
    dispatch: str | None, layer: MoELayer, ep: int | None, redundant_experts: int | None, dp: bool | None
) -> dict[str, Any]:
    """The fields of a regime that `--dispatch` stands for."""
    if dispatch is None:
        return {}
    if ":" in dispatch:
        from moetune.inputs import dispatcher

        return dict(dispatcher.resolve(dispatch, layer, ep or 1, redundant_experts or 0, dp))
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
