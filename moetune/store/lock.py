"""The lock of a store: one file that one process at a time holds with `flock`.

The system frees the lock when its holder ends, however that ends, so there is no dead lock. While the lock is held, the
file names its holder for those that wait.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetune.errors import StoreError

LOCK_NAME = ".lock"
LOCK_TIMEOUT_S = 60.0
LOCK_POLL_S = 0.01
LOCK_SAID_S = 2.0
"""How long a process waits for a lock before it says so."""
HOLDER_BYTES = 512
"""The most bytes of a lock file that are read."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock of a store, which a writer needs for the milliseconds of a merge.

    Args:
        path: the lock's file. It is created in an existing folder, and stays.

    Raises:
        OSError: the file cannot be opened, or the file system has no locks.
        StoreError: the lock is not free within `LOCK_TIMEOUT_S`.
    """
    descriptor = _acquired(path)
    try:
        with suppress(OSError):  # on a full disk the holder has no name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also if a child of this process has inherited the file
        os.close(descriptor)


def _acquired(path: Path) -> int:
    """Returns the descriptor of the locked file, which is the one that lies at `path` at that time."""
    began, said = time.monotonic(), False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _lies_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # somebody has deleted it, and others lock a new one
            continue
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        waited_s = time.monotonic() - began
        if waited_s >= LOCK_TIMEOUT_S:
            raise StoreError(
                f"The lock {path} was not free within {LOCK_TIMEOUT_S:.0f} s. {holder} holds it.",
                "End that process, or give another folder with --store.",
            )
        if waited_s >= LOCK_SAID_S and not said:
            said = True
            logging.getLogger("moetune").warning("Waiting for the lock %s. %s holds it.", path, holder)
        time.sleep(LOCK_POLL_S)


def _lies_at(descriptor: int, path: Path) -> bool:
    """Returns whether an open file is the one at `path`."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _holder(descriptor: int) -> str:
    """Returns who holds a lock, as the file says."""
    try:
        holder = json.loads(os.pread(descriptor, HOLDER_BYTES, 0))
        pid, host = int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "Another process"
    return f"Process {pid} on {host}" if host.isprintable() else f"Process {pid}"
