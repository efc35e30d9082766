"""Reads files that anyone can have written. Every file that moetune opens to read is opened here.

Only regular files are read, or links that end at one. A FIFO, a device, a socket or a folder is an error at once, and
so is a file with more bytes than its reader allows. So a read neither waits nor fills the memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NoReturn

from moetune.quoting import quoted, shortened

MOST_BYTES: Final = 8 * 2**20
"""The largest JSON file. A profile has some 100 kB, a config.json that lists every module some MB."""
MOST_VALUES: Final = 1_000_000
"""The most values in one JSON document."""
MOST_NESTING: Final = 64
"""The deepest nesting of a JSON or YAML document. Real ones have less than ten levels."""
MOST_DIGITS: Final = 40
"""The most digits of an integer. Configs have 31, for a length without a limit."""
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_KINDS: Final = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def opened(path: Path | str, most: int) -> Iterator[IO[bytes]]:
    """Opens a regular file for reading.

    Args:
        path: the file.
        most: the largest size in bytes.

    Raises:
        OSError: there is no such file, it is no regular file, it is larger, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError:
        raise OSError(errno.EINVAL, "the path has a null character", os.fspath(path)) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
        if status.st_size > most:
            raise _too_large(path, most)
        yield file


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """Returns the content of a regular file.

    Raises:
        OSError: there is no such file, it is no regular file, it has more than `most` bytes, or it cannot be read.
    """
    with opened(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it has grown, or its size is not known, as in /proc
        raise _too_large(path, most)
    return content


def read_text(path: Path | str, most: int = MOST_BYTES) -> str:
    """Returns the content of a regular file in UTF-8.

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is no UTF-8.
    """
    return decoded(read_bytes(path, most))


def read_json(path: Path | str, most: int = MOST_BYTES) -> Any:
    """Returns the document in a JSON file. Raises the errors of `read_text` and `parse_json`."""
    return parse_json(read_text(path, most), most=most)


def parse_json(text: str | bytes, *, own: bool = False, most: int = MOST_BYTES) -> Any:
    """Returns a JSON document.

    NaN and infinities, integers of more than `MOST_DIGITS` digits, lone surrogates, and documents that are too deep or
    too large are refused. Of equal keys of an object the last one counts, as in every engine.

    Args:
        text: the document; bytes are UTF-8.
        own: whether moetune wrote it. Then equal keys in one object are an error too.
        most: the most characters.

    Raises:
        ValueError: it is none of these. The message is short.
    """
    text = decoded(text) if isinstance(text, bytes) else text
    if len(text) > most:
        raise ValueError(f"it has more than {most:,} characters")
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        document = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
            object_pairs_hook=_distinct if own else None,
        )
    except RecursionError:
        raise ValueError(f"it has more than {MOST_NESTING} levels") from None
    require_plain(document)
    return document


def require_plain(document: object) -> None:
    """Checks the depth and the texts of a document of dictionaries and lists.

    Raises:
        ValueError: it has more than `MOST_NESTING` levels or `MOST_VALUES` values, or a text has a lone surrogate.
    """
    level: list[object] = [document]
    count = 0
    for _ in range(MOST_NESTING):
        count += len(level)
        if count > 2 * MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        for text in level:
            if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
                raise ValueError(f"the text {quoted(text)} has half of a character (a lone surrogate)")
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"it has more than {MOST_NESTING} levels")


def decoded(content: bytes) -> str:
    """Returns UTF-8 bytes as text, without a byte order mark.

    Raises:
        ValueError: it is no UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text at byte {error.start}") from None


def _inside(outer: dict[Any, Any] | list[Any]) -> Iterator[object]:
    if isinstance(outer, dict):
        yield from outer
        yield from outer.values()
    else:
        yield from outer


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"the number {shortened(text)} has more than {MOST_DIGITS} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shortened(text)} is too large")
    return number


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice)} stands twice in one object")
    return found


def _too_large(path: Path | str, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {most:,} bytes", os.fspath(path))
