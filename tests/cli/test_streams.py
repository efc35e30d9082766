"""Closed and full streams end no command before its result is saved."""

import ctypes
import os
import subprocess
import sys

import pytest
import waiting

from moetune.cli.streams import stdout_on_stderr


def run_in_shell(way, redirections):
    return subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {redirections}', sys.executable, waiting.__file__, "wait", way],
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("way", "redirections"),
    [
        ("prints", ">&-"),
        ("prints", "2>&-"),
        ("prints", "<&- >&- 2>&-"),
        ("warns", ">&-"),
        ("warns", "2>&-"),
        ("warns", "2>/dev/full"),
    ],
)
def test_a_closed_stdout_and_a_closed_or_full_stderr_are_no_failure(way, redirections):
    ran = run_in_shell(way, redirections)
    assert ran.returncode == 0
    assert ran.stdout == ("the result × 1\n" if way == "prints" and ">&-" not in redirections.split() else "")
    assert ran.stderr == ("a warning\n" if way == "warns" and redirections == ">&-" else "")


@pytest.mark.parametrize("way", ["prints", "prints much"])
def test_a_full_stdout_is_one_error_and_exit_code_1(way):
    ran = run_in_shell(way, ">/dev/full")
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [
        "error: The result cannot be written to stdout: No space left on device.",
        "Stored profiles are not lost: `moetune show` prints them.",
    ]


def test_a_character_that_stdout_cannot_encode_is_an_escape():
    environment = {**os.environ, "PYTHONIOENCODING": "cp1251"}
    command = [sys.executable, waiting.__file__, "wait", "prints"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "the result \\xd7 1\n"


def test_what_others_print_goes_to_stderr_in_python_and_in_c(capfd):
    with stdout_on_stderr():
        print("python")
        ctypes.CDLL(None).printf(b"buffered C\n")
        os.write(1, b"descriptor\n")
    print("the result")
    sys.stdout.flush()
    out, err = capfd.readouterr()
    assert out == "the result\n"
    assert sorted(err.splitlines()) == ["buffered C", "descriptor", "python"]


def test_stdout_is_back_after_an_error(capfd):
    with pytest.raises(KeyboardInterrupt), stdout_on_stderr():
        raise KeyboardInterrupt
    print("the result")
    assert capfd.readouterr() == ("the result\n", "")
