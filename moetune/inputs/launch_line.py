"""Splits an engine's launch line into its flags, and reads the settings file that a flag names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetune.errors import UsageError

_LINE_ENDS = re.compile(r"\\[ \t]*(#[^\n]*)?\n|\n")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_SETTING = re.compile(r"^( *)([A-Za-z_][\w.-]*) *: *(.*?) *(?:#.*)?$")
TRUE = ("true", "1", "yes", "on")


@dataclass(frozen=True, slots=True)
class Words:
    """A launch line. `flags` by their names without dashes, `_` as `-`; a flag without a value has `""`."""

    variables: Mapping[str, str]
    command: tuple[str, ...]
    positional: tuple[str, ...]
    flags: Mapping[str, str]

    def first(self, *names: str) -> str | None:
        """The value of the first of these flags that is given."""
        return next((self.flags[name] for name in names if name in self.flags), None)

    def number(self, *names: str, default: int | None = None) -> int | None:
        """As `first`, an integer; `8k` is 8000 and `8K` is 8192, as vLLM reads them.

        Raises:
            UsageError: no integer.
        """
        value = self.first(*names)
        if value is None:
            return default
        factor = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(value[-1:], 1)
        digits = value[:-1] if factor > 1 else value
        if not re.fullmatch(r"-?\d+", digits):
            raise UsageError(f"--{names[0]} must be an integer, given {value!r}.")
        return int(digits) * factor

    def switch(self, *names: str) -> bool:
        """Whether one of these flags is given and not said to be false."""
        value = self.first(*names)
        return value is not None and (value == "" or value.lower() in TRUE)


def split(spelled: str) -> list[str]:
    """The words of a shell command; continued lines are joined, and comments after them left out.

    Raises:
        UsageError: quotes that do not close.
    """
    try:
        return shlex.split(_LINE_ENDS.sub(" ", spelled + "\n"))
    except ValueError as error:
        raise UsageError(f"The launch line cannot be split into words: {error}.") from None


def parse(words: list[str], start: int, switches: Iterable[str]) -> Words:
    """The words of a command whose arguments begin at `start`.

    Args:
        words: of the whole line; assignments before the command are its variables.
        start: index of the first argument.
        switches: flags that take no value unless it is true or false.
    """
    alone = set(switches)
    variables = dict(word.split("=", 1) for word in words[:start] if _ASSIGNMENT.match(word))
    flags: dict[str, str] = {}
    positional: list[str] = []
    rest = words[start:]
    while rest:
        word = rest.pop(0)
        if not re.match(r"--?[A-Za-z]", word):
            positional.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if not equals and rest and not re.match(r"--?[A-Za-z]", rest[0]):
            lone = name in alone and rest[0].lower() not in (*TRUE, "false", "0", "no", "off")
            value = "" if lone else rest.pop(0)
        flags[name] = value
    return Words(variables, tuple(words[:start]), tuple(positional), flags)


def settings(path: str) -> dict[str, str]:
    """The scalars of a YAML file, by dotted names: `moe_config.backend`; lists are left out.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The launch line's settings file {path!r} cannot be read: {error}.",
            "Give its path as it is here, or leave it out and give --dp, --ep … beside --launch.",
        ) from None
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = _SETTING.match(line)
        if not match:
            continue
        indent, name, value = len(match[1]), match[2], match[3].strip("'\"")
        above = [(depth, parent) for depth, parent in above if depth < indent]
        if value:
            found[".".join([*(parent for _, parent in above), name])] = value
        else:
            above.append((indent, name))
    return found
