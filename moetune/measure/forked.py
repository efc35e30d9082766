"""Finds out whether torch works in this process, which may be a forked copy of one that has used it."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetune.errors import UnsupportedError

TRY_S = 10.0
"""How long one small op may take before it counts as hanging."""
_FORKED_WITHOUT_EXEC = 0x40
"""PF_FORKNOEXEC of Linux's include/linux/sched.h, in the 9th field of /proc/PID/stat."""


@contextmanager
def working_torch(device: str | None) -> Iterator[None]:
    """Runs the block so that torch does not hang in it.

    The threads of torch's OpenMP pool do not exist in a forked copy of the process, so the first parallel op of its
    main thread waits for them for ever. vLLM's engine core is such a copy. On a GPU the few ops that run on the CPU
    get one thread there. On the CPU that would change what is measured. CUDA does not work there either once it has
    been initialized.

    Args:
        device: the torch device that was asked for; None is the GPU if there is one.

    Raises:
        UnsupportedError: torch does not work in this process.
    """
    if not _is_forked():
        yield
        return
    import torch

    if device != "cpu" and torch.cuda._is_in_bad_fork():
        raise _refused("CUDA cannot be initialized again")
    threads = torch.get_num_threads()
    if device == "cpu" or not torch.cuda.is_available():
        if threads > 1 and _hangs():
            raise _refused("its threads do not exist here, and the tune would hang")
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _refused(broken: str) -> UnsupportedError:
    return UnsupportedError(
        f"This process was forked from one that had already used torch: {broken}.",
        "Start it with spawn, as multiprocessing.get_context('spawn') does, or before torch is used.",
    )


def _is_forked() -> bool:
    """Returns whether this process is a copy of its parent that has not started another program since."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not on Linux
        return False
    return bool(int(fields[6]) & _FORKED_WITHOUT_EXEC)


def _hangs() -> bool:
    """Returns whether a parallel op hangs. A copy of this process tries it, because a hanging op cannot be ended."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist; the copy uses nothing of theirs
        copy = os.fork()
    if copy == 0:
        try:
            torch.ones(1 << 20).add_(1.0)
        finally:
            os._exit(0)
    deadline = time.monotonic() + TRY_S
    while time.monotonic() < deadline:
        if os.waitpid(copy, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(copy, signal.SIGKILL)
    os.waitpid(copy, 0)
    return True
