"""Why something failed, in one line that a profile keeps."""

from __future__ import annotations

import signal

MOST_CHARACTERS = 240


def reason_of(error: BaseException) -> str:
    """The type and the first line of an exception; running out of memory is said in these words first.

    Where the first line only introduces (Triton's tells a place in the source, then quotes it), the last one follows.
    """
    lines = str(error).strip().splitlines() or [""]
    said = f"{lines[0]} {lines[-1].strip()}" if len(lines) > 1 and lines[0].endswith(":") else lines[0]
    named = f"{type(error).__name__}: {said}".removesuffix(": ")
    return shortened(f"out of memory: {named}" if is_out_of_memory(error) else named)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory could not be had, in any of the ways in which Python, torch and CUDA say so."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def reason_of_death(returncode: int, last_words: str = "") -> str:
    """How a process ended, by its return code (minus the signal's number, or the exit status).

    Args:
        last_words: the last line that it wrote to stderr; counts where it ended itself.
    """
    if returncode < 0 and -returncode != signal.SIGABRT:
        last_words = ""  # it had no time to write any: these are older
    if returncode < 0:
        how = f"killed by {_signal_name(-returncode)}"
        if -returncode == signal.SIGKILL:
            how += ", as the system does when memory runs out"
    else:
        how = f"the process exited with status {returncode}"
    return shortened(f"{how}: {last_words}" if last_words else how)


def shortened(text: str) -> str:
    """`text`, cut where it is longer than a table can bear."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
