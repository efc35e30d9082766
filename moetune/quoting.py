"""How text that others wrote appears in messages: short, and without characters that a terminal obeys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

MOST_QUOTED: Final = 200
"""Number of characters of an input that a message quotes."""
MOST_IN_PATH: Final = 4_096
"""Number of characters of a path that can exist (`PATH_MAX` of Linux)."""
MOST_CONDENSED: Final = 1_000
"""Number of characters of another library's message."""
MOST_LISTED: Final = 8
"""Number of names that a message lists."""


def quoted(value: object) -> str:
    """Returns the value's `repr`, shortened."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; a value that contains itself
        return f"a {type(value).__name__} that is too long to print"


def shortened(text: str) -> str:
    """Returns the first `MOST_QUOTED` characters of a text, and `…` if there are more."""
    return text if len(text) <= MOST_QUOTED else f"{text[:MOST_QUOTED]}…"


def shown_path(path: object) -> str:
    """Returns a path whole, because a reader copies it. One that is too long for any file is shortened."""
    text = str(path)
    return text if len(text) <= MOST_IN_PATH else shortened(text)


def enumerated(words: Iterable[object], most: int = MOST_LISTED, separator: str = ", ") -> str:
    """Returns `a, b, c`, each word shortened, with `and N more` in place of the words after the first `most`."""
    named: Sequence[object] = list(words)
    text = separator.join(shortened(str(word)) for word in named[:most])
    return f"{text} and {len(named) - most} more" if len(named) > most else text


def condensed(text: str) -> str:
    """Returns a message of another library, which can quote an input whole: each word shortened, then all of it."""
    words = " ".join(shortened(word) for word in text.split(" "))
    return words if len(words) <= MOST_CONDENSED else f"{words[:MOST_CONDENSED]}…"


def printable(text: str) -> str:
    """Returns a text in which every character that is not printable is written as its escape sequence.

    Newlines stay. Others would move a terminal's cursor, change its colors, or reverse the order of the text.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else escaped(char) for char in text)


def escaped(char: str) -> str:
    r"""Returns a character as Python writes it in a literal: `\x1b`."""
    return char.encode("unicode_escape").decode("ascii")
