"""Ends the process in order when SIGINT (Ctrl-C), SIGTERM or SIGHUP arrives.

The first signal raises `KeyboardInterrupt`, so that everything is closed and what is finished stays saved. The second
ends the process at once. Children end with it, because they watch their connection (`measure.child`).

Python code can lose a `KeyboardInterrupt`: it may be raised in an import whose caller catches every error, as torch's
import of numpy is, or in a finalizer. So none is raised during an import, and a lost one is raised again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from moetune.tuning.uninterrupted import ENDING, SAME_S

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

EXIT_CODE_BASE = 128
"""The exit code is this and the signal's number, as shells have it: 130, 143 and 129."""
AGAIN_S = 0.05
"""The interval at which a signal that has not ended the command is looked at again."""
WRITING_S = 1.0
"""How long a write to a standard stream is waited for. A reader that has stopped may never end it."""

_received: signal.Signals | None = None
_since = 0.0
_is_taken = False


def install() -> None:
    """Handles the signals from now on. Signals that were ignored when the process started, as by nohup, stay ignored.

    Call it in the main thread, and only in a process that runs nothing but the command line.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def pending() -> bool:
    """Returns whether a signal was received, and the command line does not know it yet."""
    return _received is not None and not _is_taken


def take() -> signal.Signals:
    """Returns the signal that was received, and raises nothing for it any more. It is SIGINT if there was none."""
    global _is_taken
    _is_taken = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    return _received or signal.SIGINT


def leave() -> None:
    """Lets a signal end the process as by default, for the time in which the interpreter ends."""
    for number in ENDING:
        if signal.getsignal(number) is _receive:
            signal.signal(number, signal.SIG_DFL)


def end_at_once() -> NoReturn:
    """Ends the process with the exit code of the signal. Nothing is closed, and no `finally` runs."""
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # shows the cursor, which the progress bar hides
    os._exit(EXIT_CODE_BASE + (_received or signal.SIGINT))


def _receive(number: int, frame: FrameType | None) -> None:
    global _received, _since
    if _received is not None:
        if time.monotonic() - _since > SAME_S:
            end_at_once()
        return
    _received, _since = signal.Signals(number), time.monotonic()
    sys.unraisablehook = _unless_interrupt
    signal.signal(signal.SIGALRM, _look)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    _look(number, frame)


def _look(number: int, frame: FrameType | None) -> None:
    """Raises the interrupt, unless it is being handled, an import could lose it, or a line would be written twice."""
    if pending() and not (_is_handled() or _is_importing(frame) or _is_writing(frame)):
        raise KeyboardInterrupt


def _is_handled() -> bool:
    """Returns whether an `except` or `finally` runs because of an interrupt."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _is_writing(frame: FrameType | None) -> bool:
    """Returns whether the standard streams are being written or exchanged, for `WRITING_S` at most."""
    in_streams = frame is not None and frame.f_globals.get("__name__") == "moetune.cli.streams"
    return in_streams and time.monotonic() - _since < WRITING_S


def _unless_interrupt(lost: UnraisableHookArgs) -> None:
    """Reports an error that Python cannot raise, but no interrupt: that is raised again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
