"""Loads layers by name. `models/` has one JSON file per model, with the source of each field."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from moetune.errors import UsageError
from moetune.inputs import repositories
from moetune.inputs.hf import Reading, read_config
from moetune.inputs.suggestions import did_you_mean
from moetune.quoting import quoted
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer

SIZE_OPTIONS: Mapping[str, str] = {
    "num_experts": "--experts",
    "top_k": "--top-k",
    "hidden_size": "--hidden",
    "intermediate_size": "--intermediate",
}
"""The command-line option for each size of a layer."""


_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)")
"""Matches `owner/name`."""


class Source(NamedTuple):
    """The sources of a preset: the model's page, and for each field of the layer the origin of its value."""

    url: str
    fields: Mapping[str, str]


@functools.cache
def names() -> tuple[str, ...]:
    """Returns the presets' names, sorted."""
    files = resources.files("moetune.inputs").joinpath("models").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def preset(name: str) -> MoELayer:
    """Returns the layer of a preset; case is ignored.

    Raises:
        UsageError: no such preset.
    """
    key = _key(name)
    return MoELayer(name=key, **_file(key)["layer"])


def source(name: str) -> Source:
    """Returns the sources of a preset's values.

    Raises:
        UsageError: no such preset.
    """
    found = _file(_key(name))["source"]
    return Source(found["url"], found["fields"])


def layer(name_or_path: str | os.PathLike[str], precision: Precision | str | None = None) -> MoELayer:
    """Returns the layer that `read` finds, and warns with its notes.

    Raises:
        UsageError, UnsupportedError: as `read`.
    """
    found = read(name_or_path, precision)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found.layer


def read(name_or_path: str | os.PathLike[str], precision: Precision | str | None = None) -> Reading:
    """Reads a preset by its name, a listed Hugging Face repository, or a `config.json`.

    A name with a separator or the ending `.json`, and the name of a folder, are paths. A folder must have a
    `config.json`. If there is no such path, `owner/name` is a repository of `repositories.json`.

    Args:
        name_or_path: the preset, repository or path.
        precision: replaces the precision of the weights.

    Raises:
        UsageError: the preset, repository or precision is unknown, the config cannot be used, or the repository's
            precision is not known and none is given.
        UnsupportedError: moetune does not support experts of this kind.
    """
    given = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and given.lower() in names():
        found = preset(given)
        return Reading(found if precision is None else MoELayer(**{**dict(found), "precision": precision}), ())
    if isinstance(name_or_path, str) and _REPOSITORY.fullmatch(given) and not os.path.exists(given):
        known = repositories.find(given)
        if known.precision == repositories.UNKNOWN and precision is None:
            raise UsageError(
                f"The model {given} has the shape of {known.preset}, but moetune does not know how its experts are "
                "quantized.",
                "Give --precision, or the path of its config.json.",
            )
        own = None if known.precision == repositories.UNKNOWN else known.precision
        return read(known.preset, precision or own)
    if not isinstance(name_or_path, str) or _is_path(given):
        return read_config(given, precision=precision)
    return Reading(preset(given), ())


def layer_from_sizes(
    base: MoELayer | None,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    precision: Precision | str | None = None,
    name: str = "custom",
) -> MoELayer:
    """Returns a layer of the given sizes, which are those of one whole expert, before any sharding.

    Args:
        base: the layer that supplies all other values, also routing and activation. Without it, all sizes must be
            given, and the layer is bf16 with silu and a softmax router that renormalizes the top-k weights.
        num_experts, top_k, hidden_size, intermediate_size: E, k, H and I; None means the base's.
        precision: the precision of the weights; None means the base's.
        name: the layer's name.

    Raises:
        UsageError: a size is missing, or the sizes do not fit each other or the base's groups.
    """
    sizes = {
        "num_experts": num_experts,
        "top_k": top_k,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    given: dict[str, Any] = {field: size for field, size in sizes.items() if size is not None}
    if precision is not None:
        given["precision"] = precision
    if base is None and (missing := [SIZE_OPTIONS[field] for field in sizes if field not in given]):
        raise UsageError(
            f"A layer without a model needs all its sizes; not given: {', '.join(missing)}.",
            "For example: --experts 256 --top-k 8 --hidden 7168 --intermediate 2048.",
        )
    return MoELayer(**{**({} if base is None else dict(base)), **given, "name": name})


def _is_path(text: str) -> bool:
    separators = {os.sep, os.altsep or os.sep}
    return any(mark in text for mark in separators) or text.endswith(".json") or (bool(text) and os.path.isdir(text))


def _key(name: str) -> str:
    key = name.strip().lower()
    if key in names():
        return key
    near = did_you_mean(key, names(), cutoff=0.45)
    raise UsageError(
        f"Unknown model {quoted(name)}.",
        f"{near} `moetune models` lists all names. A path to a config.json works too.".lstrip(),
    )


@functools.cache
def _file(name: str) -> dict[str, Any]:
    text = resources.files("moetune.inputs").joinpath("models", f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]
