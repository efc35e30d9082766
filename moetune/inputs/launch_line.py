"""Reads a server's arguments as its own parser does: flags by their table, one model, nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from moetune.errors import UsageError
from moetune.inputs import settings_file
from moetune.inputs.flag_table import FlagTable
from moetune.inputs.shell import Word

TRUE: Final = ("true", "1", "yes", "on")
_FLAG: Final = re.compile(r"--?[A-Za-z]")
_NUMBER: Final = re.compile(r"(-?\d+)(\.\d+)?([kKmMgG]?)")
_MODEL: Final = re.compile(r"\$\{?\w*(MODEL|PATH|CHECKPOINT|CKPT|REPO|HF)\w*\}?$", re.IGNORECASE)
"""A variable that stands where the model is named is taken for a model by its own name; any other may hold flags."""
_FACTORS: Final = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


@dataclass(frozen=True, slots=True)
class Value:
    """What a flag was given: its words, none for a switch, and the dotted keys beside them (`--x.key VALUE`)."""

    words: tuple[Word, ...] = ()
    keys: Mapping[str, Word] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Line:
    """The arguments of one server.

    `flags` by their canonical names; `positional` are words that belong to no flag; `unknown` the flags that the
    engine's version in `table` does not have, as they were written; `notes` say what became of flags of older versions.
    """

    table: FlagTable
    variables: Mapping[str, Word]
    flags: Mapping[str, Value]
    positional: tuple[Word, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def given(self, *names: str) -> Value | None:
        """The value of the first of these flags that is given."""
        return next((self.flags[name] for name in names if name in self.flags), None)

    def text(self, *names: str) -> str | None:
        """The one word of the first of these flags that is given.

        Raises:
            UsageError: the flag has no value or several, or its value is left to the user's shell.
        """
        value = self.given(*names)
        if value is None:
            return None
        shown = f"--{next(name for name in names if name in self.flags)}"
        if len(value.words) != 1:
            raise UsageError(f"{shown} takes one value, given {' '.join(word.text for word in value.words) or 'none'}.")
        return known_text(value.words[0], shown)

    def number(self, *names: str, default: int | None = None, least: int = 1) -> int | None:
        """As `text`, an integer; `8k` is 8000, `8K` 8192 and `25.6k` 25600, as vLLM's `human_readable_int` has it.

        Raises:
            UsageError: no integer, or one below `least`.
        """
        text = self.text(*names)
        return default if text is None else number(text, f"--{names[0]}", least)

    def switch(self, *names: str) -> bool:
        """Whether one of these switches is given and not taken back later (`--no-NAME`)."""
        return any(name in self.flags for name in names)

    def object(self, *names: str) -> dict[str, Any] | None:
        """The JSON object of the first of these flags that is given, with its dotted keys.

        Raises:
            UsageError: no JSON object, or left to the user's shell.
        """
        value = self.given(*names)
        if value is None:
            return None
        shown = f"--{names[0]}"
        found: Any = {}
        if value.words:
            text = known_text(value.words[-1], shown)
            try:
                found = json.loads(text)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise UsageError(f"{shown} must be a JSON object, given {text!r}.")
        return {**found, **{key: known_text(word, f"{shown}.{key}") for key, word in value.keys.items()}}

    def variable(self, name: str) -> str | None:
        """An environment variable that the line sets; an empty one is not set.

        Raises:
            UsageError: its value is left to the user's shell.
        """
        word = self.variables.get(name)
        return (known_text(word, name) or None) if word is not None else None

    @property
    def assumed(self) -> tuple[str, ...]:
        """Expansions that were taken by the defaults which they name."""
        words = [*self.positional, *(word for value in self.flags.values() for word in value.words)]
        return tuple(dict.fromkeys(one for word in words for one in word.assumed))


def known_text(word: Word, what: str) -> str:
    """The word's text.

    Raises:
        UsageError: part of it is an expansion that the line does not determine.
    """
    if word.unexpanded:
        raise UsageError(
            f"{what}: {word.unexpanded[0]} has no value in the launch line.",
            "Write its value, set the variable in the line, or give the option beside --launch.",
        )
    return word.text


def number(text: str, shown: str, least: int = 1) -> int:
    """An integer that may end in k, K, m, M, g or G.

    Raises:
        UsageError: no integer, or one below `least`.
    """
    match = _NUMBER.fullmatch(text.replace("_", ""))
    scaled = Fraction(match[1] + (match[2] or "")) * _FACTORS[match[3]] if match else None
    if scaled is None or scaled.denominator != 1:
        raise UsageError(f"{shown} must be an integer, given {text!r}.")
    if scaled < least:
        raise UsageError(f"{shown} must be at least {least}, given {text}.")
    return int(scaled)


def parse(
    words: Iterable[Word], table: FlagTable, variables: Mapping[str, Word], settings_flag: str | None = None
) -> Line:
    """The arguments of a server by its flags' table.

    Args:
        words: what follows the program.
        table: the engine's flags; what takes no value takes none here, whatever follows.
        variables: the environment that the line sets.
        settings_flag: the flag that names a file of further flags; those of the line win over the file's.

    Raises:
        UsageError: a switch with a value, or a word that only the user's shell could turn into flags.
    """
    line = _parse(list(words), table, variables)
    value = line.given(settings_flag) if settings_flag else None
    if value is None:
        return line
    path = line.text(str(settings_flag))
    settings = settings_file.read(str(path), f"--{settings_flag}")
    model = [Word(str(settings.pop(key))) for key in ("model", "model_tag", "model-tag") if key in settings]
    filed = _parse(settings_file.as_flags(settings), table, variables)
    return Line(
        table,
        variables,
        {**filed.flags, **line.flags},
        line.positional or tuple(model[:1]) or filed.positional,
        (*line.unknown, *filed.unknown),
        (*line.notes, *filed.notes),
    )


def _parse(rest: list[Word], table: FlagTable, variables: Mapping[str, Word]) -> Line:
    flags: dict[str, Value] = {}
    positional: list[Word] = []
    unknown: list[str] = []
    notes: list[str] = []
    while rest:
        word = rest.pop(0)
        if not _FLAG.match(word.text):
            if word.unexpanded == (word.text,) and (positional or not _MODEL.search(word.text)):
                known_text(word, "The launch line")
            if word.text:
                positional.append(word)
            continue
        name, equals, attached = word.text.partition("=")
        flag = table.find(name)
        values = [Word(attached, word.unexpanded, word.assumed)] if equals else []
        if flag is None:
            unknown.append(name)
            if not equals and rest and not _FLAG.match(rest[0].text):
                rest.pop(0)
            continue
        if flag.is_removed:
            notes.append(f"{table.engine} {table.version} has no {name}: {flag.note}")
        if flag.value == "none":
            if equals:
                raise UsageError(f"{name} is a switch and takes no value, given {word.text}.", f"Write {name} alone.")
            flags.pop(flag.name, None)
            if not flag.negates(name):
                flags[flag.name] = Value()
            continue
        if not values:
            most = {"one": 1, "optional": 1, "json": 1, "many": len(rest)}[flag.value]
            while rest and len(values) < most and not _FLAG.match(rest[0].text):
                values.append(rest.pop(0))
        _, dot, dotted = name.partition(".")
        if dot and values:
            before = flags.get(flag.name, Value())
            flags[flag.name] = Value(before.words, {**before.keys, dotted.replace("-", "_"): values[0]})
        else:
            flags[flag.name] = Value(tuple(values), flags[flag.name].keys if flag.name in flags else {})
    return Line(table, variables, flags, tuple(positional), tuple(unknown), tuple(notes))
