"""Reads the arrays of `.npy`, `.npz` and `.safetensors` files. Nothing is unpickled.

A header is read first. An array is then converted while it is read, in pieces, so that the memory holds its ids once.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Final

import torch

from moetune.quoting import quoted, shortened
from moetune.recordings.zipped import require_small_directory
from moetune.untrusted import parse_json

MOST_BYTES: Final = 2**27
"""The largest file, and the largest content of a compressed one."""
MOST_NUMBERS: Final = 2**25
"""The most numbers of one array: 65,536 tokens of 64 layers and top-8."""
_MOST_ID: Final = 2**31 - 1
_PIECE: Final = 2**20
_MOST_HEADER: Final = 10_000
_NPY: Final = re.compile(
    r"\{'descr': (?P<descr>'[^']{1,16}'|\[.*\]), 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>[0-9, ]{0,99})\), \}\s*",
    re.DOTALL,
)
_NPY_TYPES: Final = {
    "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
    "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64,
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64,
}  # fmt: skip
_SAFETENSORS_TYPES: Final = {
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Array:
    """An array whose numbers are read when `numbers` is called: int32 if they are integers, otherwise float32."""

    shape: tuple[int, ...]
    is_integer: bool
    numbers: Callable[[], torch.Tensor]


def npy(file: IO[bytes]) -> Array:
    """Returns the array of a `.npy` file, format 1 to 3 (numpy/lib/format.py).

    Raises:
        ValueError: it is no such file, it needs pickle, or it has no plain numbers or too many.
    """
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("it is no .npy file")
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if length > _MOST_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {_MOST_HEADER:,}")
    header = _NPY.fullmatch(file.read(length).decode("latin-1"))
    if header is None:
        raise ValueError("its header is not one that numpy writes")
    descr = header["descr"].strip("'")
    if descr == "|O":
        raise ValueError("it has Python objects, which only pickle reads, and moetune never unpickles. Save integers")
    dtype = _NPY_TYPES.get(descr[1:]) if descr[:1] in "<|" else None
    if dtype is None:
        raise ValueError(f"its numbers are of the type {quoted(descr)}; integers are needed, little-endian")
    shape = tuple(int(each) for each in header["shape"].replace(" ", "").split(",") if each)
    _require_few(shape)
    in_file = shape[::-1] if header["fortran"] == "True" else shape

    def numbers() -> torch.Tensor:
        found = _converted(file, dtype, in_file)
        return found if in_file == shape else found.permute(*range(len(shape))[::-1]).contiguous()

    return Array(shape, not dtype.is_floating_point, numbers)


def npz(file: IO[bytes]) -> Iterator[tuple[str, Array]]:
    """Yields the name and the array of each member of a `.npz` file. An array must be read before the next one.

    Raises:
        ValueError: as `npy`, or it is no ZIP archive, or its content is too large.
    """
    require_small_directory(file, most=2**16)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (size := sum(member.file_size for member in members)) > MOST_BYTES:
                raise ValueError(f"its content has {size:,} bytes, more than {MOST_BYTES:,}")
            for member in members:
                with archive.open(member) as inner:
                    yield member.filename.removesuffix(".npy"), npy(inner)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"it is no ZIP archive as numpy writes it: {shortened(str(error))}") from None
    except Exception as error:
        if type(error).__module__ == "zlib":
            raise ValueError(f"it is damaged: {shortened(str(error))}") from None
        raise


def safetensors(file: IO[bytes]) -> Iterator[tuple[str, Array]]:
    """Yields the name and the array of each tensor of a `.safetensors` file.

    The file begins with the length of a JSON header, 8 bytes, little-endian. The header has the type, the shape and the
    place of each tensor after it (github.com/huggingface/safetensors, "Format").

    Raises:
        ValueError: it is no such file, or a tensor has too many numbers.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= 2**20:
        raise ValueError("it is no .safetensors file")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("it is no .safetensors file")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _safetensors_entry(name, entry)
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size:
            raise ValueError(f"{quoted(name)} has {end - begin:,} bytes, its shape {json.dumps(shape)} needs {size:,}")

        def numbers(
            place: int = 8 + length + begin, dtype: torch.dtype = dtype, shape: tuple[int, ...] = shape
        ) -> torch.Tensor:
            file.seek(place)
            return _converted(file, dtype, shape)

        yield name, Array(shape, not dtype.is_floating_point, numbers)


def _safetensors_entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            dtype in _SAFETENSORS_TYPES
            and all(type(each) is int and each >= 0 for each in shape)
            and 0 <= begin <= end <= MOST_BYTES
        ):
            _require_few(shape)
            return _SAFETENSORS_TYPES[dtype], tuple(shape), begin, end
    raise ValueError(f"the entry of {quoted(name)} in its header is not one that safetensors writes")


def _require_few(shape: tuple[int, ...] | list[int]) -> None:
    if (count := math.prod(shape)) > MOST_NUMBERS:
        raise ValueError(f"it has {count:,} numbers, more than {MOST_NUMBERS:,}. Keep fewer tokens or layers")


def _converted(file: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns numbers that a file has from its present place on, int32 or float32.

    Raises:
        ValueError: the file ends too early, or as `as_ids` and `as_weights`.
    """
    count = math.prod(shape)
    found = torch.empty(count, dtype=torch.float32 if dtype.is_floating_point else torch.int32)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        piece = bytearray(size * dtype.itemsize)
        view, got = memoryview(piece), 0
        while got < len(piece):
            part = file.read(len(piece) - got)
            if not part:
                raise ValueError("it ends before its last number")
            view[got : got + len(part)] = part
            got += len(part)
        numbers = torch.frombuffer(piece, dtype=dtype)
        found[start : start + size] = as_weights(numbers) if dtype.is_floating_point else as_ids(numbers)
    return found.view(shape)


def as_ids(numbers: torch.Tensor) -> torch.Tensor:
    """Returns integers as int32.

    Raises:
        ValueError: one is out of range.
    """
    if numbers.dtype == torch.int32:
        return numbers
    found = torch.empty(numbers.numel(), dtype=torch.int32)
    for piece, target in zip(torch.split(numbers.reshape(-1), _PIECE), torch.split(found, _PIECE), strict=True):
        wide = piece.to(torch.int64)
        if len(wide) and (int(wide.min()) < -_MOST_ID or int(wide.max()) > _MOST_ID):
            raise ValueError("an id is out of the range of 32 bits")
        target.copy_(wide)
    return found.view(numbers.shape)


def as_weights(numbers: torch.Tensor) -> torch.Tensor:
    """Returns floating-point numbers as float32.

    Raises:
        ValueError: one is NaN or infinite.
    """
    found = numbers.to(torch.float32)
    if not bool(found.isfinite().all()):
        raise ValueError("a weight is NaN or infinite")
    return found
