"""Reads the YAML or JSON settings file that a launch line names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Final

import yaml

from moetune.errors import UsageError
from moetune.inputs.shell import Word
from moetune.quoting import shortened, shown_path
from moetune.untrusted import MOST_DIGITS, MOST_NESTING, read_text, require_plain

MOST_BYTES: Final = 65_536
"""The largest file. PyYAML reads some 100 kB in a second."""
MOST_NODES: Final = 20_000
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C, where PyYAML has it, is ten times faster."""
_CONSTRUCTORS_ERRORS: Final = (RecursionError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)
"""What PyYAML raises for values that do not fit their tags."""


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
        text = read_text(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        said = shortened(str(error))
        raise UsageError(f"{flag} {shown_path(path)}: the file cannot be read: {said}.", hint) from None
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{flag} {path}: the file is {error}.", "Correct it.") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(
            f"{flag} {path}: the file must have settings by name, found {type(found).__name__}.",
            "Write one `name: value` a line.",
        )
    return found


def parse_yaml(text: str) -> Any:
    """Returns the document in a YAML or JSON text. Its keys are texts.

    Raises:
        ValueError: it is not YAML, too deep, too large once its aliases are replaced, or has values that JSON has not.
    """
    try:
        return _plain(_loaded(text))
    except (yaml.YAMLError, *_CONSTRUCTORS_ERRORS) as error:
        said = shortened(" ".join(str(error).split())) or type(error).__name__
        raise ValueError(f"not YAML: {said}") from None


def _loaded(text: str) -> Any:
    """Returns the document in a YAML text.

    Raises:
        ValueError: it is too deep, or too large once its aliases are replaced.
    """
    depths = accumulate((char in "[{") - (char in "]}") for char in text)
    if max(depths, default=0) > MOST_NESTING:  # PyYAML would need time that grows with its square
        raise ValueError(f"it has more than {MOST_NESTING} levels")
    loader = _LOADER(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Returns the number of nodes below a node with its aliases replaced, and of the levels below it.

    Args:
        node: the node. It may contain itself.
        known: what is known of other nodes, by their id. Each node is visited once.
        depth: the number of levels above it.
    """
    if id(node) not in known:
        if depth > MOST_NESTING:
            raise ValueError(f"it has more than {MOST_NESTING} levels")
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        sizes = [_size(part, known, depth + 1) for part in parts]
        known[id(node)] = (
            1 + sum(size for size, _ in sizes),
            1 + max((height for _, height in sizes), default=0),
        )
    size, height = known[id(node)]
    if size > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES:,} values once its aliases are replaced")
    if depth + height > MOST_NESTING + 2:
        raise ValueError(f"it has more than {MOST_NESTING} levels")
    return size, height


def _plain(value: Any) -> Any:
    """Returns a document whose keys are texts.

    Raises:
        ValueError: it has other values than JSON has, such as a date, or an integer that is too long.
    """
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MOST_DIGITS:
        raise ValueError(f"an integer has more than {MOST_DIGITS} digits")
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"a value is a {type(value).__name__}: write it in quotes")
    require_plain(value)
    return value


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
