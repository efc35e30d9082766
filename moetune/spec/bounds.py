"""The largest values that layers, regimes and profiles accept. Each is far above what exists.

They keep a typing error, or a file from elsewhere, from asking for terabytes.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from moetune.errors import UsageError
from moetune.quoting import quoted

MOST_EXPERTS: Final = 65_536
MOST_TOP_K: Final = 1_024
MOST_SIZE: Final = 1_048_576
"""Of hidden and intermediate sizes."""
MOST_RANKS: Final = 65_536
MOST_DRAWS: Final = 4_096
MOST_ROWS: Final = 16_777_216
MOST_BUCKETS: Final = 4_096
MOST_CHARACTERS: Final = 1_000
"""Of a name: a layer's, a device's, a version's."""
MOST_IN_A_FILE_NAME: Final = 100
"""Characters of a name that become part of a file's name."""
MOST_ENTRIES: Final = 1_000
"""Of an environment, a tactic or another mapping of a profile."""
MOST_TACTICS: Final = 100_000
"""In one list of a choice."""


def require_between(name: str, value: int, least: int, most: int) -> None:
    """Checks a number.

    Raises:
        UsageError: it is out of range.
    """
    if value < least:
        raise UsageError(f"{name} must be at least {least}, given {quoted(value)}.")
    if value > most:
        raise UsageError(f"{name} must be at most {most:,}, given {quoted(value)}.")


def _on_one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must have printable characters only")
    return text


def _without_surrogates(text: str) -> str:
    text.encode()  # raises a ValueError
    return text


Name = Annotated[str, Field(max_length=MOST_CHARACTERS), AfterValidator(_on_one_line)]
"""A text that is shown inside a line, or is part of a file's name."""
Prose = Annotated[str, AfterValidator(_without_surrogates)]
"""A text of any length, as an exception gives it."""
Names = Annotated[dict[Name, Name], Field(max_length=MOST_ENTRIES)]
Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]
Count = Annotated[int, Field(ge=0, le=2**53)]


def require_file_name_part(text: str) -> str:
    """Returns a backend's name, which is part of its profiles' file names.

    Raises:
        ValueError: it has other characters than letters, digits, `-`, `_` and `.`, begins with `-` or `.`, or is too
            long.
    """
    if len(text) > MOST_IN_A_FILE_NAME or not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise ValueError(
            f"A backend's name has at most {MOST_IN_A_FILE_NAME} letters, digits, '-', '_' and '.', given "
            f"{quoted(text)}."
        )
    return text


FileNamePart = Annotated[str, AfterValidator(require_file_name_part)]
