"""Splits a shell text into commands, and marks the expansions that only the user's own shell could resolve.

The rules are those of POSIX.1-2017, Shell Command Language, 2.2 (quoting), 2.3 (token recognition), 2.6 (expansions)
and 2.7 (redirection), with bash's arrays. `shlex` does not distinguish a quoted `$` from an expansion, nor `2>` from an
argument. bashlex has a licence that this package cannot carry. A compiled grammar would have to be installed into every
engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from moetune.errors import UsageError

MOST_CHARACTERS: Final = 32_768
"""The longest text."""
MOST_EXPANDED: Final = 131_072
"""The most characters that replace variables."""
_BLANKS: Final = " \t\r"
_OPERATORS: Final = ("&&", "||", "|&", ";;", "&", "|", ";", "(", ")", "\n")
_REDIRECTION: Final = re.compile(r"&>>|&>|<<<|<<-|<<|<>|<&|>>|>&|>\||<|>")
_CONTINUED: Final = re.compile(r"\\[ \t]*(?:[ \t]#[^\n]*)?\r?(?:\n|$)")
_SINGLE_QUOTE: Final = re.compile(r"\$?'")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=")
_DEFAULTED: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):?[-=](.*)", re.DOTALL)
_ELEMENTS: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\[[@*]\]")
_RESERVED: Final = ("if", "then", "else", "elif", "while", "until", "do", "{", "}", "!", "time", "fi", "done", "$")


@dataclass(frozen=True, slots=True)
class Word:
    """One argument after expansion and removal of quotes.

    Attributes:
        text: the argument.
        unexpanded: expansions whose value the shell text does not give (`$EP`, `$(nproc)`); `text` has them as written.
        assumed: expansions that were replaced by the default written in them (`${TP:-8}`).
    """

    text: str
    unexpanded: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """One simple command: its words, and the variables that the text sets for it or before it."""

    words: tuple[Word, ...]
    variables: Mapping[str, Word] = field(default_factory=dict)


def commands(text: str, variables: Mapping[str, Word] | None = None) -> tuple[Command, ...]:
    """Returns the simple commands of a shell text, in order, without redirections and comments.

    A backslash continues the line even if blanks and a comment follow it. A shell would not accept that, but documents
    write it.

    Args:
        text: lines of a shell.
        variables: the variables that are set before the first line.

    Raises:
        UsageError: a quote or a bracket is not closed, or the text is too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"A launch line has at most {MOST_CHARACTERS:,} characters, given {len(text):,}.",
            "Give the command that starts the server alone.",
        )
    return tuple(_Reader(text, dict(variables or {})).read())


@dataclass(slots=True)
class _Field:
    """A word that is being read. `begun` is true once the word exists, even if it is empty (`""`)."""

    text: list[str] = field(default_factory=list)
    unexpanded: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    begun: bool = False
    quoted: bool = False

    def add(self, text: str) -> None:
        self.text.append(text)
        self.begun = True

    def word(self) -> Word:
        return Word("".join(self.text), tuple(self.unexpanded), tuple(self.assumed))


class _Reader:
    """Reads the text once, from start to end. `variables` and `arrays` hold what the text has set so far."""

    def __init__(self, text: str, variables: dict[str, Word]) -> None:
        self.text, self.at = text, 0
        self.variables = variables
        self.arrays: dict[str, list[Word]] = {}
        self.heredocs: list[str] = []
        self.expanded = 0

    def read(self) -> Iterator[Command]:
        words: list[Word] = []
        own: dict[str, Word] = {}
        while True:
            self._skip_blanks()
            operator = self._operator()
            if operator is None and self.at < len(self.text):
                if not self._redirection():
                    self._argument(words, own)
                continue
            if operator == "\n":
                self._skip_heredocs()
            if words or own:
                yield from self._finished(words, own)
                words, own = [], {}
            if operator is None:
                return

    def _finished(self, words: list[Word], own: dict[str, Word]) -> Iterator[Command]:
        while words and words[0].text in _RESERVED:
            words = words[1:]
        if words and words[0].text in ("export", "declare", "typeset", "readonly"):
            for word in words[1:]:
                if match := _ASSIGNMENT.match(word.text):
                    own[match[1]] = Word(word.text[match.end() :], word.unexpanded, word.assumed)
            words = []
        if words:
            yield Command(tuple(words), {**self.variables, **own})
        else:
            self.variables.update(own)

    def _skip_blanks(self) -> None:
        while self.at < len(self.text):
            if self.text[self.at] in _BLANKS:
                self.at += 1
            elif match := _CONTINUED.match(self.text, self.at):
                self.at = match.end()
            elif self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def _operator(self) -> str | None:
        if self.text.startswith(("&>", "<(", ">("), self.at):
            return None
        found = next((mark for mark in _OPERATORS if self.text.startswith(mark, self.at)), None)
        self.at += len(found or "")
        return found

    def _redirection(self) -> bool:
        """Skips a redirection with its number and its target, if one begins here."""
        number = re.compile(r"\d+(?=[<>])|\{\w+\}(?=[<>])").match(self.text, self.at)
        match = _REDIRECTION.match(self.text, number.end() if number else self.at)
        if match is None or self.text.startswith(("<(", ">("), self.at):
            return False
        self.at = match.end()
        self._skip_blanks()
        target = self._field(_Field())
        if match[0] in ("<<", "<<-"):
            self.heredocs.append(target.word().text)
        return True

    def _skip_heredocs(self) -> None:
        for delimiter in self.heredocs:
            end = re.compile(rf"^\t*{re.escape(delimiter)}[ \t]*$", re.MULTILINE).search(self.text, self.at)
            self.at = end.end() if end else len(self.text)
        self.heredocs = []

    def _argument(self, words: list[Word], own: dict[str, Word]) -> None:
        match = _ASSIGNMENT.match(self.text, self.at)
        if match and not words:
            self.at = match.end()
            if self.text.startswith("(", self.at):
                self.arrays[match[1]] = (self.arrays.get(match[1], []) if match[2] else []) + self._array()
                return
            before = self.variables.get(match[1], Word("")) if match[2] else Word("")
            value = self._field(_Field()).word()
            own[match[1]] = Word(before.text + value.text, before.unexpanded + value.unexpanded, value.assumed)
            return
        current = _Field()
        self._field(current, words)
        if current.begun:
            words.append(current.word())

    def _array(self) -> list[Word]:
        self.at += 1
        elements: list[Word] = []
        while True:
            self._skip_blanks()
            if self.at >= len(self.text):
                raise _unclosed("(")
            if self.text[self.at] in ")\n":
                self.at += 1
                if self.text[self.at - 1] == ")":
                    return elements
                continue
            start = self.at
            self._argument_of_array(elements)
            if self.at == start:
                raise _unclosed("(")

    def _argument_of_array(self, elements: list[Word]) -> None:
        current = _Field()
        self._field(current, elements)
        if current.begun:
            elements.append(current.word())

    def _field(self, current: _Field, split: list[Word] | None = None) -> _Field:
        """Reads to the end of a word. Blanks in an unquoted expansion end words; these are added to `split`."""
        while self.at < len(self.text) and not self._at_end_of_word():
            char = self.text[self.at]
            if char in "<>":
                self._unknown(current, self._bracketed(self.at + 1, "(", ")"))
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif char == "\\":
                current.add(self.text[self.at + 1 : self.at + 2])
                self.at += 2
            elif quote := _SINGLE_QUOTE.match(self.text, self.at):
                current.add(self._until("'", quote.end()))
            elif char == '"':
                self._double_quoted(current, split)
            elif char in "$`":
                self._expansion(current, split, quoted=False)
            else:
                current.add(char)
                self.at += 1
        return current

    def _at_end_of_word(self) -> bool:
        if self.text.startswith(("<(", ">("), self.at):
            return False
        continued = _CONTINUED.match(self.text, self.at)
        return self.text[self.at] in _BLANKS + "\n;&|()<>" or (continued is not None and continued[0] != "\\\n")

    def _double_quoted(self, current: _Field, split: list[Word] | None) -> None:
        self.at += 1
        current.begun = True
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\", "\n"):
                current.add("" if self.text[self.at + 1] == "\n" else self.text[self.at + 1])
                self.at += 2
            elif char in "$`":
                self._expansion(current, split, quoted=True)
            else:
                current.add(char)
                self.at += 1
        raise _unclosed('"')

    def _until(self, mark: str, start: int) -> str:
        end = self.text.find(mark, start)
        if end < 0:
            raise _unclosed(mark)
        self.at = end + 1
        return self.text[start:end]

    def _bracketed(self, start: int, opening: str, closing: str) -> int:
        """Returns the index after the bracket that closes the one at `start`."""
        depth = 0
        for index in range(start, len(self.text)):
            depth += (self.text[index] == opening) - (self.text[index] == closing)
            if depth == 0:
                return index + 1
        raise _unclosed(opening)

    def _expansion(self, current: _Field, split: list[Word] | None, *, quoted: bool) -> None:
        if self.text[self.at] == "`":
            end = self.text.find("`", self.at + 1)
            if end < 0:
                raise _unclosed("`")
            return self._unknown(current, end + 1)
        following = self.text[self.at + 1 : self.at + 2]
        if following == "(":
            return self._unknown(current, self._bracketed(self.at + 1, "(", ")"))
        if following == "{":
            end = self._bracketed(self.at + 1, "{", "}")
            return self._parameter(current, split, self.text[self.at + 2 : end - 1], end, quoted=quoted)
        if match := _NAME.match(self.text, self.at + 1):
            return self._parameter(current, split, match[0], match.end(), quoted=quoted)
        if following and following in "@*#?$!-0123456789":
            return self._unknown(current, self.at + 2)
        current.add("$")
        self.at += 1
        return None

    def _count(self, *words: Word) -> None:
        """Counts what replaces a variable. Variables that contain others can double with each line."""
        self.expanded += sum(len(word.text) + len(word.unexpanded) + len(word.assumed) + 1 for word in words)
        if self.expanded > MOST_EXPANDED:
            raise UsageError(
                f"The launch line cannot be read: its variables have more than {MOST_EXPANDED:,} characters.",
                "Write their values where they are used.",
            )

    def _unknown(self, current: _Field, end: int) -> None:
        written = self.text[self.at : end]
        current.add(written)
        current.unexpanded.append(written)
        self.at = end

    def _parameter(self, current: _Field, split: list[Word] | None, inner: str, end: int, *, quoted: bool) -> None:
        """Replaces `${inner}`, which ends before `end`, by a variable, all elements of an array, or its default."""
        written = self.text[self.at : end]
        if (elements := _ELEMENTS.fullmatch(inner)) and elements[1] in self.arrays and split is not None:
            self.at = end
            listed = self.arrays[elements[1]]
            self._count(*listed)
            return self._spread(current, split, listed if quoted else [part for one in listed for part in _parts(one)])
        value, defaulted = self.variables.get(inner), _DEFAULTED.fullmatch(inner)
        if value is None and defaulted:
            value = self.variables.get(defaulted[1])
            if value is None and "$" not in defaulted[2]:
                value = Word(defaulted[2], assumed=(written,))
        if value is None:
            return self._unknown(current, end)
        self.at = end
        self._count(value)
        if quoted or split is None:
            current.unexpanded += value.unexpanded
            current.assumed += value.assumed
            return current.add(value.text)
        return self._spread(current, split, _parts(value))

    def _spread(self, current: _Field, split: list[Word], parts: list[Word]) -> None:
        """Joins the first of `parts` to the word and begins a new word with each other."""
        for index, part in enumerate(parts):
            if index:
                split.append(current.word())
                current.text, current.unexpanded, current.assumed = [], [], []
            current.add(part.text)
            current.unexpanded += part.unexpanded
            current.assumed += part.assumed
        if not parts:
            current.begun = bool(current.text)


def _parts(word: Word) -> list[Word]:
    return [Word(part, word.unexpanded, word.assumed) for part in word.text.split()]


def _unclosed(mark: str) -> UsageError:
    return UsageError(
        f"The launch line cannot be read: {mark} is not closed.", "Give the whole command, with all of its quotes."
    )
