"""Checks a ZIP archive before it is opened."""

from __future__ import annotations

import io
from typing import IO, Final

_END: Final = b"PK\x05\x06"
_END_BYTES: Final = 22
_LOCATOR: Final = b"PK\x06\x07"
_LOCATOR_BYTES: Final = 20
_END_64: Final = b"PK\x06\x06"


def require_small_directory(file: IO[bytes], most: int) -> None:
    """Checks the size of an archive's directory, of which Python's reader keeps every entry in memory.

    The archive must end with its end record (APPNOTE.TXT 4.3.16), without a comment. numpy and torch write none.

    Args:
        file: the archive. Its place is moved to the start.
        most: the largest directory in bytes.

    Raises:
        ValueError: it is no such archive, or the directory is larger.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES))
    tail = file.read()
    end = tail[-_END_BYTES:]
    if end[:4] != _END or end[20:] != b"\0\0":
        raise ValueError("it is no ZIP archive")
    directory = int.from_bytes(end[12:16], "little")
    locator = tail[:-_END_BYTES]
    if locator[:4] == _LOCATOR:
        file.seek(int.from_bytes(locator[8:16], "little") % 2**63)
        end_64 = file.read(56)
        if end_64[:4] != _END_64:
            raise ValueError("it is no ZIP archive")
        directory = int.from_bytes(end_64[40:48], "little")
    if directory > most:
        raise ValueError(f"the directory of its archive has {directory:,} bytes, more than {most:,}")
    file.seek(0)
