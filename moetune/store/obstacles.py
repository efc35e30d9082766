"""Says why a store cannot be written, and what to do about it."""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

from moetune.errors import MoetuneError, StoreError, UsageError
from moetune.store.folders import STORE_VARIABLE

_ELSEWHERE = f"Give another folder with --store or {STORE_VARIABLE}."
_WRONG_FOLDER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def obstacle(root: Path, error: OSError) -> MoetuneError:
    """Returns the error to raise if a store cannot be written.

    Args:
        root: the store's folder.
        error: what the system said.

    Returns:
        A `UsageError` if another folder is needed, such as on a read-only mount; a `StoreError` if this one may be
        written later, such as on a full disk.
    """
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    message = f"The store {root} cannot be written: {error.strerror or error}{f': {name}' if name else ''}."
    if error.errno in _FULL:
        return StoreError(message, f"Free some space, or g{_ELSEWHERE[1:]}")
    if error.errno in _NO_LOCKS:
        return StoreError(message, f"Its file system has no locks. {_ELSEWHERE}")
    if error.errno in _WRONG_FOLDER:
        return UsageError(message, f"{_of_another_user(name)}{_ELSEWHERE}")
    return StoreError(message, _ELSEWHERE)


def _of_another_user(name: str) -> str:
    """Returns a sentence about the owner of a file that the present user may not write, or nothing."""
    try:
        owner = os.stat(name, follow_symlinks=False).st_uid
    except (OSError, ValueError):
        return ""
    if owner == os.geteuid() or os.access(name, os.W_OK):
        return ""
    try:
        known = pwd.getpwuid(owner).pw_name
    except KeyError:
        known = str(owner)
    return f"It belongs to {known}, who can share it with `chmod g+w`. "
