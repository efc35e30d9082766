"""Profiles and other versioned JSON, read from files and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from moetune.errors import DamagedProfileError, MoetuneError, NewerSchemaError, StoreError
from moetune.quoting import quoted, shortened, shown_path
from moetune.store.profile import SCHEMA_VERSION, Profile
from moetune.untrusted import parse_json, read_bytes

Model = TypeVar("Model", bound=BaseModel)


def load_profile(path: Path | str) -> Profile:
    """Reads and checks one profile file. The file is not changed.

    Raises:
        StoreError: there is no such file, or it cannot be read.
        DamagedProfileError: the file is not a valid profile.
        NewerSchemaError: a newer moetune wrote it.
    """
    try:
        return read_profile(Path(path))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"There is no profile file {shown_path(path)}.", "`moetune store list` shows the stored ones."
        ) from None


def read_profile(path: Path) -> Profile:
    """Reads and checks one profile file. The file is not changed.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        DamagedProfileError: the file is not a valid profile.
        NewerSchemaError: a newer moetune wrote it.
        StoreError: it cannot be read.
    """
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise StoreError(f"The profile {shown_path(path)} cannot be read: {error.strerror or error}.") from None
    return parsed(content, Profile, SCHEMA_VERSION, str(path))


def parsed(content: bytes, model: type[Model], schema_version: int, name: str) -> Model:
    """Parses versioned JSON and checks it against its model.

    Args:
        content: one JSON document.
        model: its model, which has a field `schema_version`.
        schema_version: the newest version that this moetune knows.
        name: the document's name in errors.

    Raises:
        DamagedProfileError: the document does not fit the model.
        NewerSchemaError: a newer moetune wrote it.
    """
    try:
        document = parse_json(content, own=True)
        version = document["schema_version"] if isinstance(document, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError(f"unknown schema_version {quoted(version)}")
        if version > schema_version:
            raise NewerSchemaError(
                f"{name} has schema_version {version}, and this moetune knows up to {schema_version}.",
                "Update moetune, or give another folder with --store.",
            )
        return model.model_validate(document)
    except NewerSchemaError:
        raise
    except (MoetuneError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedProfileError(f"{name} is no {model.__name__.lower()}: {_one_line(error)}.") from None


def _one_line(error: Exception) -> str:
    """Returns an error as one line without a final full stop."""
    match error:
        case KeyError():
            text = f"no {shortened(str(error.args[0]))}"
        case MoetuneError():
            text = error.message
        case _:
            text = str(error)
    return " ".join(text.split()).rstrip(".")
