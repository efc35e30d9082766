"""Reads the YAML or JSON settings file that a launch line names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moetune.errors import UsageError
from moetune.inputs.shell import Word


def read(path: str, flag: str) -> dict[str, Any]:
    """Returns the settings in the file at `path`, with their keys unchanged.

    Args:
        path: relative to the working directory.
        flag: the flag that names the file, for the error.

    Raises:
        UsageError: the file cannot be read, is not YAML, or is not an object.
    """
    hint = "Pass a path that exists on this machine, or leave the flag out and pass --dp, --ep … to moetune."
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: the file cannot be read: {error}.", hint) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(
            f"{flag} {path}: the file is not YAML: {' '.join(str(error).split())}.", "Correct it."
        ) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(
            f"{flag} {path}: the file must have settings by name, found {type(found).__name__}.",
            "Write one `name: value` a line.",
        )
    return {str(name): value for name, value in found.items()}


def setting(settings: Mapping[str, Any], *names: str) -> Any:
    """Returns the value under the nested `names`, or None if one is missing. `-` and `_` are taken as equal."""
    found: Any = settings
    for name in names:
        if not isinstance(found, Mapping):
            return None
        found = {str(key).replace("-", "_"): value for key, value in found.items()}.get(name.replace("-", "_"))
    return found


def as_flags(settings: Mapping[str, Any]) -> list[Word]:
    """Returns the settings as words of a command line, as vLLM's and SGLang's own readers do.

    True gives a switch, False and null give nothing, a list gives one word for each element, an object gives JSON
    (`FlexibleArgumentParser.load_config_file` of vLLM, `ConfigArgumentMerger` of SGLang).
    """
    words: list[Word] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        words.append(Word(f"--{name.replace('_', '-')}"))
        if isinstance(value, Mapping):
            words.append(Word(json.dumps(value)))
        elif isinstance(value, list):
            words += [Word(json.dumps(one) if isinstance(one, Mapping | list) else str(one)) for one in value]
        elif value is not True:
            words.append(Word(str(value)))
    return words
