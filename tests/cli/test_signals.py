"""SIGINT, SIGTERM and SIGHUP end a command in order: none is lost, none is a traceback."""

import signal
import subprocess
import sys

import pytest
import waiting
from processes import GIVE_UP_S

from moetune.cli import signals

SCRIPT = waiting.__file__
CLOSING = ["slow to close", "in a generator"]
PRINTING = ["prints", "prints much", "warns"]


@pytest.fixture
def start():
    """Starts `moetune wait WAY`, and returns the process once it says that it is ready."""
    processes = []

    def _start(way, **options):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "wait", way],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        processes.append(process)
        assert process.stderr.readline() == "ready\n"
        return process

    yield _start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "error: interrupted."),
        (signal.SIGTERM, 143, "error: interrupted by SIGTERM."),
        (signal.SIGHUP, 129, "error: interrupted by SIGHUP."),
    ],
)
def test_a_signal_ends_the_command_with_a_line_and_its_exit_code(start, number, code, line):
    process = start("sleeps")
    process.send_signal(number)
    assert process.communicate(timeout=GIVE_UP_S) == ("", f"\n{line}\n")  # a terminal's line begins with ^C
    assert process.returncode == code


@pytest.mark.parametrize("way", sorted(waiting.WAYS.keys() - {"sleeps", "never closes", *PRINTING}))
def test_no_signal_is_lost_and_none_is_an_error_of_another_kind(start, way):
    process = start(way)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 130
    assert out == ("the result\n" if way == "suppressed at the end" else "")
    before = "closed\n" if way in CLOSING else "imported\n" if way == "in an import" else ""
    assert err.replace("\n\n", "\n").lstrip("\n") == f"{before}error: interrupted.\n"


def test_two_signals_at_once_are_one_request_and_a_later_one_ends_the_process_at_once(start):
    process = start("never closes")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)  # as a shell does whose terminal is closed
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=GIVE_UP_S) == ("", "")
    assert process.returncode == 129


def test_a_signal_that_nohup_ignores_stays_ignored(start):
    process = start("sleeps", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 143


def test_the_library_changes_no_handler():
    code = "import signal, moetune; moetune.tune, moetune.cli; print(signal.getsignal(signal.SIGTERM).name)"
    code = code.replace("moetune.cli", "__import__('moetune.cli.main')")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "SIG_DFL\n"


def test_without_a_signal_an_interrupt_counts_as_ctrl_c(monkeypatch):
    monkeypatch.setattr(signals, "_is_taken", False)
    assert not signals.pending()
    assert signals.take() is signal.SIGINT
