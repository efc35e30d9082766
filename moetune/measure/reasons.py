"""Describes failures in one line, for profiles and tables."""

from __future__ import annotations

import re
import signal

from moetune.quoting import printable

MOST_CHARACTERS = 240
"""The longest reason."""

NOT_RUN = "not run: "
"""How the reason of a tactic begins that did not run, but may run another time."""
GIB = 1 << 30
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}
_ALLOCATION = re.compile(r"Tried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)")
"""In the message of torch.OutOfMemoryError, with the units of `format_size` in torch's CUDACachingAllocator.cpp."""


class CrowdedError(Exception):
    """There was no memory for a tactic, and other processes held some.

    Args:
        held: the bytes that other processes held on the device.
        total: the bytes that the device has.
        tries: how often it was tried.
    """

    def __init__(self, held: int, total: int, tries: int) -> None:
        times = "once" if tries == 1 else f"{tries} times"
        super().__init__(
            f"{NOT_RUN}tried {times}, memory was lacking while other processes held {held / GIB:.1f} of "
            f"{total / GIB:.1f} GiB"
        )


def reason_of(error: BaseException) -> str:
    """Returns the type and the first line of an exception. For a lack of memory it begins with "out of memory".

    If the first line ends with a colon, the last line is added. Triton's errors begin with a source position like that.
    """
    if isinstance(error, CrowdedError):
        return str(error)
    lines = _message(error).strip().splitlines() or [""]
    text = f"{lines[0]} {lines[-1].strip()}" if len(lines) > 1 and lines[0].endswith(":") else lines[0]
    reason = f"{type(error).__name__}: {text}".removesuffix(": ")
    return _on_one_line(f"out of memory: {reason}" if is_out_of_memory(error) else reason)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the error is a failed allocation of host or device memory, in Python, torch or CUDA."""
    text = _message(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def asked_bytes(error: BaseException) -> float:
    """Returns the size of the allocation that failed, as torch's message names it; 0 if the message names none."""
    found = _ALLOCATION.search(_message(error))
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def reason_of_death(returncode: int, last_line: str = "") -> str:
    """Returns how a process ended.

    Args:
        returncode: the exit status, or minus the number of the signal that killed the process.
        last_line: the last line that it wrote to stderr. It is ignored if a signal other than SIGABRT killed it.
    """
    if returncode < 0 and -returncode != signal.SIGABRT:
        last_line = ""  # other signals leave no time to write a message, so the line is an older one
    if returncode < 0:
        how = f"killed by {_signal_name(-returncode)}"
        if -returncode == signal.SIGKILL:
            how += ", as the system does when memory runs out"
    else:
        how = f"the process exited with status {returncode}"
    return _on_one_line(f"{how}: {last_line}" if last_line else how)


def _message(error: BaseException) -> str:
    """Returns the message of an exception. A backend's own exceptions may raise when they are asked for it."""
    try:
        return str(error)
    except Exception as raised:
        return f"its message cannot be read ({type(raised).__name__})"


def _on_one_line(text: str) -> str:
    return shortened(printable(text).replace("\n", r"\n"))


def both(first: str, second: str) -> str:
    """Returns the reason of a tactic that failed twice, the second time alone in a new process."""
    if first == second:
        return f"{shortened(first, MOST_CHARACTERS - 7)}, twice"
    return shortened(f"{shortened(first, MOST_CHARACTERS // 2)}; tried again: {second}")


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Returns `text`, cut to `most` characters with an ellipsis if it is longer."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
