"""Parses a server's arguments as the engine's own parser does."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from moetune.errors import UsageError
from moetune.inputs import settings_file
from moetune.inputs.flag_table import Flag, FlagTable
from moetune.inputs.shell import Word
from moetune.quoting import quoted, shortened
from moetune.spec.enums import ENGINE_TITLES
from moetune.untrusted import MOST_DIGITS, parse_json

TRUE: Final = ("true", "1", "yes", "on")
_FLAG: Final = re.compile(r"--?[A-Za-z]")
_NUMBER: Final = re.compile(r"(-?\d+)(\.\d+)?([kKmMgG]?)")
_MODEL: Final = re.compile(r"\$\{?\w*(MODEL|PATH|CHECKPOINT|CKPT|REPO|HF)\w*\}?$", re.IGNORECASE)
"""Variables whose name says that they contain a model. Any other variable may contain flags."""
_FACTORS: Final = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


@dataclass(frozen=True, slots=True)
class Value:
    """The words given to a flag (none for a switch), and its dotted keys (`--x.key VALUE`)."""

    words: tuple[Word, ...] = ()
    keys: Mapping[str, Word] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Line:
    """The parsed arguments of one server.

    Attributes:
        table: the flags of the engine.
        variables: the environment variables that the line sets.
        flags: the given flags by canonical name.
        positional: words that belong to no flag.
        unknown: flags, as written, that the engine's version in `table` does not have.
        notes: what replaced given flags of older versions.
    """

    table: FlagTable
    variables: Mapping[str, Word]
    flags: Mapping[str, Value]
    positional: tuple[Word, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def given(self, *names: str) -> Value | None:
        """Returns the value of the first of these flags that is given."""
        return next((self.flags[name] for name in names if name in self.flags), None)

    def text(self, *names: str) -> str | None:
        """Returns the single word of the first of these flags that is given.

        Raises:
            UsageError: the flag has no value or several, or its value needs the user's shell.
        """
        value = self.given(*names)
        if value is None:
            return None
        shown = f"--{next(name for name in names if name in self.flags)}"
        if len(value.words) != 1:
            raise UsageError(
                f"{shown} takes one value, given {shortened(' '.join(word.text for word in value.words)) or 'none'}."
            )
        return known_text(value.words[0], shown)

    def number(self, *names: str, default: int | None = None, least: int = 1) -> int | None:
        """Returns `text` as an integer: `8k` is 8000, `8K` is 8192, `25.6k` is 25600 (vLLM's `human_readable_int`).

        Raises:
            UsageError: not an integer, or below `least`.
        """
        text = self.text(*names)
        return default if text is None else number(text, f"--{names[0]}", least)

    def switch(self, *names: str) -> bool:
        """Returns whether one of these switches is given and not negated later (`--no-NAME`)."""
        return any(name in self.flags for name in names)

    def object(self, *names: str) -> dict[str, Any] | None:
        """Returns the JSON object of the first of these flags that is given, with its dotted keys.

        Raises:
            UsageError: not a JSON object, or it needs the user's shell.
        """
        value = self.given(*names)
        if value is None:
            return None
        shown = f"--{names[0]}"
        found: Any = {}
        if value.words:
            text = known_text(value.words[-1], shown)
            try:
                found = parse_json(text)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise UsageError(f"{shown} must be a JSON object, given {quoted(text)}.")
        return {**found, **{key: known_text(word, f"{shown}.{key}") for key, word in value.keys.items()}}

    def variable(self, name: str) -> str | None:
        """Returns an environment variable that the line sets; an empty one counts as unset.

        Raises:
            UsageError: its value needs the user's shell.
        """
        word = self.variables.get(name)
        return (known_text(word, name) or None) if word is not None else None

    @property
    def assumed(self) -> tuple[str, ...]:
        """Returns the shell expansions that were replaced by their own defaults."""
        words = [*self.positional, *(word for value in self.flags.values() for word in value.words)]
        return tuple(dict.fromkeys(one for word in words for one in word.assumed))


def known_text(word: Word, what: str) -> str:
    """Returns the word's text.

    Raises:
        UsageError: it contains an expansion without a known value.
    """
    if word.unexpanded:
        raise UsageError(
            f"{what}: {word.unexpanded[0]} has no value in the launch line.",
            "Write its value, set the variable in the line, or pass the option to moetune.",
        )
    return word.text


def number(text: str, shown: str, least: int = 1) -> int:
    """Returns an integer that may end in k, K, m, M, g or G.

    Raises:
        UsageError: not an integer, or below `least`.
    """
    match = _NUMBER.fullmatch(text.replace("_", "")) if len(text) <= MOST_DIGITS else None
    scaled = Fraction(match[1] + (match[2] or "")) * _FACTORS[match[3]] if match else None
    if scaled is None or scaled.denominator != 1:
        raise UsageError(f"{shown} must be an integer, given {quoted(text)}.")
    if scaled < least:
        raise UsageError(f"{shown} must be at least {least}, given {shortened(text)}.")
    return int(scaled)


def parse(
    words: Iterable[Word], table: FlagTable, variables: Mapping[str, Word], settings_flag: str | None = None
) -> Line:
    """Returns the parsed arguments of a server.

    Args:
        words: what follows the program.
        table: the engine's flags.
        variables: the environment that the line sets.
        settings_flag: the flag that names a file of further flags. Flags of the line override the file's.

    Raises:
        UsageError: a switch has a value, or a word needs the user's shell.
    """
    line = _parse(words, table, variables)
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


def _parse(words: Iterable[Word], table: FlagTable, variables: Mapping[str, Word]) -> Line:
    reader = _Reader(table, deque(words))
    while reader.rest:
        reader.read_next()
    return Line(table, variables, reader.flags, tuple(reader.positional), tuple(reader.unknown), tuple(reader.notes))


@dataclass(slots=True)
class _Reader:
    """Sorts the words in `rest` into flags, positional words, unknown flags and notes."""

    table: FlagTable
    rest: deque[Word]
    flags: dict[str, Value] = field(default_factory=dict)
    positional: list[Word] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read_next(self) -> None:
        """Reads one positional word, or one flag with its values."""
        word = self.rest.popleft()
        if not _FLAG.match(word.text):
            self._read_positional(word)
            return
        name, equals, text = word.text.partition("=")
        attached = Word(text, word.unexpanded, word.assumed) if equals else None
        flag = self.table.find(name)
        if flag is None:
            self.unknown.append(name)
            if attached is None:
                self._following(1)
            return
        if flag.is_removed:
            self.notes.append(f"{ENGINE_TITLES[self.table.engine]} {self.table.version} has no {name}: {flag.note}")
        if flag.value == "none":
            self._read_switch(flag, name, attached)
        else:
            self._read_values(flag, name, attached)

    def _read_positional(self, word: Word) -> None:
        if word.unexpanded == (word.text,) and (self.positional or not _MODEL.search(word.text)):
            known_text(word, "The launch line")
        if word.text:
            self.positional.append(word)

    def _read_switch(self, flag: Flag, name: str, attached: Word | None) -> None:
        if attached is not None:
            given = f"{name}={attached.text}"
            raise UsageError(f"{name} is a switch and takes no value, given {given}.", f"Write {name} alone.")
        self.flags.pop(flag.name, None)
        if not flag.negates(name):
            self.flags[flag.name] = Value()

    def _read_values(self, flag: Flag, name: str, attached: Word | None) -> None:
        values = [attached] if attached is not None else self._following(len(self.rest) if flag.value == "many" else 1)
        before = self.flags.get(flag.name, Value())
        _, dot, key = name.partition(".")
        if dot and values:
            self.flags[flag.name] = Value(before.words, {**before.keys, key.replace("-", "_"): values[0]})
        else:
            self.flags[flag.name] = Value(tuple(values), before.keys)

    def _following(self, most: int) -> list[Word]:
        """Removes and returns up to `most` of the next words, ending at a flag."""
        values: list[Word] = []
        while self.rest and len(values) < most and not _FLAG.match(self.rest[0].text):
            values.append(self.rest.popleft())
        return values
