"""Named layers: one JSON file a model in `models/`, each field with its source beside it."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from moetune.errors import UsageError
from moetune.inputs.hf import layer_from_config
from moetune.spec.layer import MoELayer
from moetune.spec.words import Precision

SIZE_OPTIONS: Mapping[str, str] = {
    "num_experts": "--experts",
    "top_k": "--top-k",
    "hidden_size": "--hidden",
    "intermediate_size": "--intermediate",
}
"""The command line's names of a layer's sizes."""


class Source(NamedTuple):
    """Where a preset comes from: the model's page, and for each field of the layer where its value stands."""

    url: str
    fields: Mapping[str, str]


@functools.cache
def names() -> tuple[str, ...]:
    """The presets' names, sorted."""
    files = resources.files("moetune.inputs").joinpath("models").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def preset(name: str) -> MoELayer:
    """The layer of a preset; case is ignored, a prefix is not a name.

    Raises:
        UsageError: no such preset; the message lists the nearest names.
    """
    key = _key(name)
    return MoELayer(name=key, **_file(key)["layer"])


def source(name: str) -> Source:
    """Where the values of a preset stand.

    Raises:
        UsageError: no such preset.
    """
    found = _file(_key(name))["source"]
    return Source(found["url"], found["fields"])


def layer(name_or_path: str | os.PathLike[str], precision: Precision | str | None = None) -> MoELayer:
    """A preset by its name, or the layer of a Hugging Face `config.json` or of the folder that holds one.

    A path is what has a separator, ends in `.json` or is a folder. `precision` replaces the weights' own.

    Raises:
        UsageError: no such preset, a config that cannot be used, or no such precision.
    """
    given = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and given.lower() in names():
        found = preset(given)
        return found if precision is None else MoELayer(**{**dict(found), "precision": precision})
    if not isinstance(name_or_path, str) or _is_path(given):
        return layer_from_config(given, precision=precision)
    return preset(given)


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
    """A layer by its sizes: those of one whole expert, before any sharding.

    Args:
        base: gives what is not given here, routing and activation included. Without it all sizes must be given; the
            layer is bf16 and silu, and routes by a softmax whose chosen weights are renormalized.
        num_experts, top_k, hidden_size, intermediate_size: E, k, H and I; None is the base's.
        precision: of the weights; None is the base's.
        name: the layer's.

    Raises:
        UsageError: a size is missing, or they do not fit each other or the base's groups.
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
    return any(mark in text for mark in separators) or text.endswith(".json") or (bool(text) and Path(text).is_dir())


def _key(name: str) -> str:
    key = name.strip().lower()
    if key in names():
        return key
    related = [known for known in names() if key and key in known]
    similar = difflib.get_close_matches(key, names(), n=4, cutoff=0.45)
    nearest = list(dict.fromkeys([*related, *similar]))[:6]
    raise UsageError(
        f"Unknown model {name!r}.",
        (f"Nearest: {', '.join(nearest)}; all" if nearest else "All names")
        + ": moetune models. A path to a config.json works too.",
    )


@functools.cache
def _file(name: str) -> dict[str, Any]:
    text = resources.files("moetune.inputs").joinpath("models", f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]
