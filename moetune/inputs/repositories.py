"""Finds the preset and the precision of a Hugging Face repository.

`repositories.json` lists every repository, because a name alone does not show the precision. For example, moonshotai's
Kimi-K2-Thinking is int4 and Kimi-K2-Instruct is fp8.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final, NamedTuple

from moetune.errors import UsageError
from moetune.inputs.option_table import SIZES, flag
from moetune.inputs.suggestions import did_you_mean
from moetune.quoting import quoted

UNKNOWN: Final = "unknown"


class Repository(NamedTuple):
    """A listed repository. `precision` is None if it is the preset's precision, and `UNKNOWN` if it is not known."""

    preset: str
    precision: str | None


@functools.cache
def listed() -> Mapping[str, Repository]:
    """Returns every listed repository, by its name."""
    text = resources.files("moetune.inputs").joinpath("repositories.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["repositories"]
    return {name: Repository(entry["preset"], entry.get("precision")) for name, entry in found.items()}


@functools.cache
def known() -> Mapping[str, Repository]:
    """Returns every listed repository, by its name in lower case."""
    return {name.lower(): repository for name, repository in listed().items()}


def find(name: str) -> Repository:
    """Returns the entry of the repository `owner/name`; case is ignored.

    Raises:
        UsageError: the repository is not listed.
    """
    key = name.strip().rstrip("/").lower().removeprefix("https://huggingface.co/")
    if key in known():
        return known()[key]
    near = did_you_mean(key, listed(), cutoff=0.75)
    give = f"{near} Otherwise give" if near else "Give"
    raise UsageError(
        f"{quoted(name)} is neither an existing path nor a repository that moetune knows.",
        f"{give} --model PATH of its config.json, or {', '.join(map(flag, SIZES))} "
        "(a dense model has no experts to tune).",
    )
