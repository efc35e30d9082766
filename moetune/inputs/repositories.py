"""Which layer the Hugging Face repositories hold that engines are launched with.

`repositories.json` lists them one by one, each with the preset whose shape it has and its experts' precision: a name's
suffix alone decides nothing (moonshotai/Kimi-K2-Thinking is int4, Kimi-K2-Instruct fp8), and neither does a name
without its owner.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final, NamedTuple

from moetune.errors import UsageError

UNKNOWN: Final = "unknown"


class Repository(NamedTuple):
    """`preset` names the layer; `precision` is None where it is the preset's own, or `UNKNOWN`."""

    preset: str
    precision: str | None


@functools.cache
def known() -> Mapping[str, Repository]:
    """Every listed repository, by its name in lower case."""
    text = resources.files("moetune.inputs").joinpath("repositories.json").read_text(encoding="utf-8")
    listed: dict[str, Any] = json.loads(text)["repositories"]
    return {name.lower(): Repository(entry["preset"], entry.get("precision")) for name, entry in listed.items()}


def find(name: str) -> Repository:
    """The layer of the repository `owner/name`; case is ignored.

    Raises:
        UsageError: not listed; the message says what to give instead.
    """
    key = name.strip().rstrip("/").lower().removeprefix("https://huggingface.co/")
    if key in known():
        return known()[key]
    near = difflib.get_close_matches(key, known(), n=2, cutoff=0.75)
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    raise UsageError(
        f"{name!r} is no path here and no repository that moetune knows.{nearest}",
        "Give --model with a name of `moetune models` or a path to its config.json, and --precision.",
    )
