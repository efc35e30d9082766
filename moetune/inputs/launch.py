"""Turns an engine's launch line into options of moetune's command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moetune.errors import UsageError
from moetune.inputs import launch_sglang, launch_trtllm, launch_vllm
from moetune.inputs.dispatcher import untunable
from moetune.inputs.flag_table import table
from moetune.inputs.launch_command import ServerCommand, find
from moetune.inputs.launch_line import Line, known_text, parse
from moetune.inputs.launch_model import Deployed, changed_precision, model_named
from moetune.inputs.option_table import SIZES
from moetune.inputs.options import layer_of
from moetune.quoting import enumerated, quoted, shortened
from moetune.spec.distribution import parse_also, parse_distribution, parse_weighted, replay_of, skew_of
from moetune.spec.enums import ENGINE_TITLES

_Reader = Callable[[Line, Deployed], dict[str, Any]]
_READERS: Final[Mapping[str, _Reader]] = {
    "vllm": launch_vllm.options,
    "sglang": launch_sglang.options,
    "trtllm": launch_trtllm.options,
}
_SETTINGS_FLAG: Final = {"vllm": "config", "sglang": "config", "trtllm": None}
"""The flag that names a settings file, if its settings have the names of flags. TensorRT-LLM's have other names."""
_SGLANG_PLACED: Final = ("deepseek", "deepseek_hierarchical", "auto")
"""The values of SGLang's --eplb-algorithm whose rule `workload.eplb` has."""
MOST_UNKNOWN: Final = 100
"""The most flags of a line that the engine does not have."""
_DISPATCHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": ("all2all-backend", "VLLM_ALL2ALL_BACKEND"),
    "sglang": ("moe-a2a-backend", "enable-deepep-moe"),
    "trtllm": (),
}
"""The flags and variables that name a dispatcher, the flag of today first."""
DECIDING: Final = frozenset(
    {*launch_vllm.DECIDING, *launch_sglang.DECIDING, *launch_trtllm.DECIDING, "model", "model-path", "config"}
)
LARGEST_BUCKET: Final = ("--max-num-batched-tokens", "--chunked-prefill-size", "--max-num-tokens")
"""The flags that decide nothing but the largest bucket. They have no effect beyond the end of a ladder."""
_OTHER_DEVICE: Final = re.compile(r"/.*(rocm|[/-](cpu|xpu|tpu|hpu)(:|-|$))|/dev/kfd")
"""Matches a word of a container's command that names an image for another device, or ROCm's device file."""
_OTHER_DEVICE_VARIABLES: Final = ("TPU_BACKEND_TYPE", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Launch:
    """The options of a launch line, for `moetune.inputs.options.resolve`, and warnings.

    `options` also has `backend` if the line selects the kernels. `flags` are the line's flags that decide the
    deployment, with their values. The last is `no --moe-a2a-backend` if the line leaves the dispatcher to the engine.
    """

    options: dict[str, Any]
    warnings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def parsed(spelled: str) -> tuple[ServerCommand, Line]:
    """Returns the server's command of a launch line, and its arguments as the engine's own parser reads them.

    Raises:
        UsageError: the line has no server or several, or only the user's shell can expand a word.
    """
    server = find(spelled)
    flags = table(server.engine, server.program)
    return server, parse(server.arguments, flags, server.variables, _SETTINGS_FLAG[server.engine])


def read(spelled: str, given: Mapping[str, Any] | None = None) -> Launch:
    """Returns the options of a launch line.

    Args:
        spelled: the line as written in a shell, a container command or a Dockerfile.
        given: options that override the line. Parts of the line that they override are not read.

    Raises:
        UsageError: the line has no server or several, a value is invalid, a flag that matters is misspelled, the model
            is unknown, or only the user's shell can expand a word.
        UnsupportedError: the kernels, the dispatcher or the quantization are not supported.
    """
    beside = {name: value for name, value in (given or {}).items() if value is not None}
    server, line = parsed(spelled)
    warnings = [*_unknown_flags(line, server.engine, server.program), *line.notes, *_other_devices(server)]
    warnings += [f"{one} is not set in the launch line; its default is taken." for one in line.assumed]

    found: dict[str, Any] = {}
    if "model" not in beside and not all(size in beside for size in SIZES):
        repository = model_named(line, precise="precision" in beside)
        found |= {"model": repository.model, "precision": repository.precision}
        warnings += repository.warnings
    _require_no_more_words(line, server.program)
    layer = layer_of({**found, **beside})
    if "precision" not in beside:
        changed = changed_precision(line, layer.precision)
        if changed is not None:
            found["precision"] = str(changed)
            layer = layer_of({**found, **beside})
    deployed = Deployed(layer, beside, warnings)
    found |= _READERS[server.engine](line, deployed)
    distributions = [parse_distribution(beside.get("distribution", "random"))]
    distributions += [parse_weighted(each).distribution for each in parse_also(beside.get("also", ()))]
    if server.engine != "trtllm" and any(skew_of(each) or replay_of(each) for each in distributions):
        warnings += _other_placements(line, {**found, **beside}.get("redundant_experts"))
    if "dispatch" in beside or "layout" in beside:
        found.pop("dp", None)
    if "dispatch" in beside:
        found.pop("ladder", None)
        if untunable(str(found.get("dispatch"))):
            warnings.append(
                f"--dispatch {beside['dispatch']} replaces {found['dispatch']} of the launch line. That is another "
                "deployment: the engine that the line starts has another load, and reads no result of it."
            )
    options = {name: value for name, value in found.items() if value is not None and name not in beside}
    return Launch(options, tuple(dict.fromkeys(warnings)), _deciding_flags(line, server.engine, beside))


def _deciding_flags(line: Line, engine: str, beside: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the flags of `DECIDING` that the line gives, and which flag of the dispatcher it does not give."""
    given = [
        " ".join([f"--{name}", *(word.text for word in value.words)])
        for name, value in line.flags.items()
        if name in DECIDING and name not in ("model", "model-path")
    ]
    named = _DISPATCHER_NAMES[engine]
    given += [f"{name}={word.text}" for name, word in line.variables.items() if name in named]
    left_open = named and "dispatch" not in beside and not any(name in line.flags for name in named)
    if left_open and not any(name in line.variables for name in named):
        given.append(f"no --{named[0]}")
    return tuple(given)


def _other_placements(line: Line, redundant_experts: int | None) -> list[str]:
    """Returns warnings about flags by which an engine places experts otherwise than `workload.eplb` does."""
    algorithm, said = line.text("eplb-algorithm"), []
    if algorithm and algorithm not in _SGLANG_PLACED:
        said.append(
            f"--eplb-algorithm {shortened(algorithm)} has another rule. The copies are placed "
            f"as with {_SGLANG_PLACED[0]}."
        )
    if not redundant_experts and line.switch("enable-eplb"):
        said.append(
            "--enable-eplb moves experts between ranks by their load. Without redundant experts moetune leaves them in "
            "the order of the model."
        )
    return said


def _other_devices(server: ServerCommand) -> list[str]:
    """Returns a warning if the line names a device that moetune has no kernels for."""
    named = [word for word in server.launcher if _OTHER_DEVICE.search(word)]
    named += [name for name in _OTHER_DEVICE_VARIABLES if name in server.variables]
    return [f"{word} means a device without CUDA, for which moetune tunes nothing." for word in named[:1]]


def _unknown_flags(line: Line, engine: str, program: str) -> list[str]:
    """Returns warnings about flags that the engine does not have.

    Raises:
        UsageError: a flag looks like a misspelling of one that decides the kernels or their load.
    """
    said = []
    unknown = dict.fromkeys(line.unknown)
    title = "Dynamo" if program.startswith("dynamo.") else ENGINE_TITLES[engine]
    if len(unknown) > MOST_UNKNOWN:
        raise UsageError(
            f"{program} has none of these {len(unknown)} flags: {enumerated(unknown)}.", "Give the server's command."
        )
    for flag in unknown:
        nearest = line.table.nearest(flag)
        hint = f" The nearest is --{nearest}." if nearest else ""
        message = f"{program} has no flag {shortened(flag)} ({title} {line.table.version})."
        if nearest in DECIDING:
            raise UsageError(f"{message}{hint}", "Correct the line, or leave the flag out.")
        said.append(f"{message}{hint} It is ignored.")
    return said


def _require_no_more_words(line: Line, program: str) -> None:
    """Raises UsageError if the line has words that belong to no flag, other than the model's name."""
    model_takes = 0 if line.given("model", "model-path") and program != "trtllm-bench" else 1
    extra = line.positional[model_takes:]
    if extra:
        shown = " ".join(word.text for word in extra[:4])
        known_text(extra[0], "The launch line")
        raise UsageError(
            f"{program} cannot use {quoted(shown)}: it belongs to no flag.",
            "Remove it or correct the flag before it. A switch takes no value, and a comment begins with #.",
        )
