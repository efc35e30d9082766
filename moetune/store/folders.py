"""The folders that hold profiles: the user's stores, and the profiles packaged with moetune."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from moetune.errors import UsageError
from moetune.quoting import quoted

STORE_VARIABLE = "MOETUNE_STORE"
PACKAGED_VARIABLE = "MOETUNE_PACKAGED_PROFILES"
PACKAGE = Path(__file__).parents[1]


def default_roots() -> tuple[Path, ...]:
    """Returns the folders in `MOETUNE_STORE`, or `moetune` in the user's cache (`XDG_CACHE_HOME`, else `~/.cache`)."""
    if store := os.environ.get(STORE_VARIABLE):
        return roots_of(store)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return ((cache if cache.is_absolute() else expanded("~/.cache")) / "moetune",)


def roots_of(given: Path | str) -> tuple[Path, ...]:
    """Returns the folders that `given` names, such as `own:shared`, as absolute paths. A repeated one is left out.

    Raises:
        UsageError: a name is empty, or there is no home folder.
    """
    names = str(given).split(os.pathsep)
    if not all(names):
        raise UsageError(
            f"One of the stores {quoted(str(given))} has no name.",
            f"Give folders joined by {os.pathsep!r}, the one to write first.",
        )
    return tuple(dict.fromkeys(map(expanded, names)))


def packaged_root(package: Path = PACKAGE) -> Path | None:
    """Returns the folder of the packaged profiles, or None if `MOETUNE_PACKAGED_PROFILES` is 0.

    A wheel has it in the package, a checkout beside the package. The import system comes last, because with an editable
    install of another checkout it would find the profiles of that checkout.

    Args:
        package: the folder of the package `moetune`.
    """
    if os.environ.get(PACKAGED_VARIABLE) == "0":
        return None
    if (installed := package / "profiles").is_dir():
        return installed
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "profiles").is_dir():
        return checkout / "profiles"
    found = importlib.util.find_spec("moetune.profiles")
    return Path(found.origin).parent if found and found.origin else None


def expanded(path: Path | str) -> Path:
    """Returns an absolute path with `~` replaced.

    Raises:
        UsageError: there is no home folder.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UsageError(
            f"There is no home folder for the store {path}.", f"Give a folder with --store or {STORE_VARIABLE}."
        ) from None
