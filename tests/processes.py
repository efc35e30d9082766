"""The processes that a test leaves behind, if any."""

import os
import time
from pathlib import Path

GIVE_UP_S = 300.0
"""After this time a test no longer waits for something. No busy machine needs as long, so only a hang does."""


def children(parent: int | None = None) -> set[int]:
    """Processes, zombies included, whose parent is `parent`; this process by default."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == (parent or os.getpid()):
            found.add(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that its new parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition, seconds: float = GIVE_UP_S) -> bool:
    """Whether `condition()` becomes true in that time."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(true)
