"""Files of the store: read and checked, replaced as a whole and durably, moved aside unharmed."""

from __future__ import annotations

import json
import os
import secrets
from itertools import count
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from moetune.errors import DamagedProfileError, MoetuneError, NewerSchemaError, StoreError
from moetune.store.profile import SCHEMA_VERSION, Profile

Model = TypeVar("Model", bound=BaseModel)


def read_profile(path: Path) -> Profile:
    """The profile in a file, which is left as it is.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        DamagedProfileError: it is no profile of this schema.
        NewerSchemaError: it is of a newer schema.
        StoreError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise StoreError(f"The profile {path} cannot be read: {error.strerror or error}.") from None
    return parsed(content, Profile, SCHEMA_VERSION, str(path))


def parsed(content: bytes, model: type[Model], schema_version: int, name: str) -> Model:
    """What versioned JSON says, checked against its model.

    Args:
        content: one JSON document.
        model: what it should be; it has a field `schema_version`.
        schema_version: the newest that this moetune knows.
        name: what the errors call it.

    Raises:
        DamagedProfileError: it is not that.
        NewerSchemaError: it is of a newer schema.
    """
    try:
        document = json.loads(content)
        version = document["schema_version"] if isinstance(document, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError(f"unknown schema_version {version!r}")
        if version > schema_version:
            raise NewerSchemaError(
                f"{name} has schema_version {version}, and this moetune knows up to {schema_version}.",
                "Update moetune, or give another folder with --store.",
            )
        return model.model_validate(document)
    except NewerSchemaError:
        raise
    except (MoetuneError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedProfileError(f"{name} is no {model.__name__.lower()}: {one_line(error)}.") from None


def one_line(error: Exception) -> str:
    """An error as one line, without its final stop."""
    match error:
        case KeyError():
            text = f"no {error.args[0]}"
        case UnicodeDecodeError():
            text = f"no UTF-8 text at byte {error.start}"
        case MoetuneError():
            text = error.message
        case _:
            text = str(error)
    return " ".join(text.split()).rstrip(".")


def moved_aside(path: Path, error: DamagedProfileError) -> DamagedProfileError:
    """Moves a damaged file to the first free `<name>.damaged-<n>`, and says so. The lock must be held."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    _sync_folder(path.parent)
    return DamagedProfileError(error.message, f"It was moved, unharmed, to {aside}.")


def replace(path: Path, text: str) -> None:
    """Writes a file so that it has, whatever happens, its old content or its new one."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """As `mkdir --parents`, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
