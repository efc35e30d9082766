"""A command `moetune wait WAY` that says when a signal may come, and does with it what WAY says.

Run as a script it is the command line with that command: `python tests/waiting.py wait WAY`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from types import SimpleNamespace

import click

from moetune.cli import signals

SLEEP_S = 600.0


def ready() -> None:
    print("ready", file=sys.stderr, flush=True)


def sleep() -> None:
    ready()
    time.sleep(SLEEP_S)


def _in_an_import() -> None:
    with suppress(BaseException):
        import waiting_import  # noqa: F401  # an import is all it is
    print("imported", file=sys.stderr, flush=True)
    time.sleep(SLEEP_S)


class _Finalized:
    def __del__(self) -> None:
        sleep()


def _in_a_finalizer() -> None:
    _Finalized()
    time.sleep(SLEEP_S)


def _suppressed() -> None:
    with suppress(BaseException):
        sleep()
    time.sleep(SLEEP_S)


def _suppressed_at_the_end() -> None:
    with suppress(BaseException):
        sleep()
    click.echo("the result")


def _turned_into_another_error() -> None:
    try:
        sleep()
    except KeyboardInterrupt:
        raise ValueError("this was an interrupt") from None


def _slow_to_close() -> None:
    try:
        sleep()
    finally:
        time.sleep(0.3)
        print("closed", file=sys.stderr, flush=True)


def _generator() -> Generator[None]:
    try:
        yield
    finally:
        with suppress(ValueError):
            int("an error on the way")
        time.sleep(0.3)
        print("closed", file=sys.stderr, flush=True)


def _in_a_generator() -> None:
    with closing(_generator()) as items:
        for _ in items:
            sleep()


def _never_closes() -> None:
    """Its time is planted: SIGHUP and SIGTERM come at once, and then an hour passes."""
    now_s = 0.0
    vars(signals)["time"] = SimpleNamespace(monotonic=lambda: now_s)
    numbers, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    try:
        sleep()
    finally:
        while os.read(numbers, 1) != bytes([signal.SIGTERM]):
            pass
        now_s = 3600.0
        sleep()


WAYS: Mapping[str, Callable[[], None]] = {
    "sleeps": sleep,
    "in an import": _in_an_import,
    "in a finalizer": _in_a_finalizer,
    "suppressed": _suppressed,
    "suppressed at the end": _suppressed_at_the_end,
    "turned into another error": _turned_into_another_error,
    "slow to close": _slow_to_close,
    "in a generator": _in_a_generator,
    "never closes": _never_closes,
    "prints": lambda: click.echo("the result × 1"),
    "prints much": lambda: click.echo("the result\n" * 10000),
    "warns": lambda: click.echo("a warning", err=True),
}


@click.command
@click.argument("way")
def wait(way: str) -> None:
    WAYS[way]()


if __name__ == "__main__":
    from moetune.__main__ import main
    from moetune.cli.main import main as group

    group.lazy["wait"] = ("waiting:wait", "Wait.")
    main()
