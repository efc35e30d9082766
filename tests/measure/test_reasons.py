"""A reason is one short line that says what happened."""

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetune.measure.reasons import MOST_CHARACTERS, both, reason_of, reason_of_death


@given(st.text())
def test_a_reason_is_one_short_line_that_begins_with_the_type(text):
    reason = reason_of(ValueError(text))
    assert len(reason.splitlines()) == 1
    assert len(reason) <= MOST_CHARACTERS
    assert "ValueError" in reason


class UnreadableError(Exception):
    def __str__(self):
        raise ZeroDivisionError


def test_an_exception_whose_message_cannot_be_read_still_has_a_reason():
    assert reason_of(UnreadableError()) == "UnreadableError: its message cannot be read (ZeroDivisionError)"
    assert not reason_of(UnreadableError()).startswith("out of memory")


@given(st.text(st.characters()))  # lone surrogates too
def test_a_reason_can_be_printed_and_written_as_utf_8(text):
    for reason in (reason_of(ValueError(text)), reason_of_death(1, text.partition("\n")[0])):
        assert reason.isprintable()
        reason.encode()


def test_control_characters_and_bytes_that_are_no_utf_8_are_escapes():
    assert reason_of(ValueError("\x1b[31mred\tand\udcff")) == r"ValueError: \x1b[31mred\tand\udcff"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 200.00 GiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_said_first(error):
    assert reason_of(error).startswith("out of memory: ")


def test_an_error_that_begins_with_its_position_also_gives_its_last_line():
    error = ValueError('at 2:4:\ndef kernel(x_ptr):\n    tl.static_assert(False, "too wide")\n    ^\ntoo wide')
    assert reason_of(error) == "ValueError: at 2:4: too wide"


def test_a_real_allocation_that_cannot_be_had_is_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.int8)
    assert reason_of(error.value).startswith("out of memory: RuntimeError")


def test_shared_memory_of_a_block_is_not_the_memory_that_runs_out():
    assert not reason_of(RuntimeError("out of resource: shared memory, Required: 262144")).startswith("out of memory")


@pytest.mark.parametrize(
    ("returncode", "last_line", "reason"),
    [
        (-signal.SIGSEGV, "an old warning", "killed by SIGSEGV"),
        (-signal.SIGABRT, "free(): invalid pointer", "killed by SIGABRT: free(): invalid pointer"),
        (-signal.SIGKILL, "", "killed by SIGKILL, as the system does when memory runs out"),
        (1, "ImportError: no torch", "the process exited with status 1: ImportError: no torch"),
        (-40, "", "killed by signal 40"),
    ],
)
def test_a_death_is_named(returncode, last_line, reason):
    assert reason_of_death(returncode, last_line) == reason


def test_two_reasons_are_one_line_that_has_both():
    assert both("killed by SIGSEGV", "killed by SIGSEGV") == "killed by SIGSEGV, twice"
    assert both("a", "b") == "a; tried again: b"
    long = both("a" * 300, "b" * 300)
    assert len(long) == MOST_CHARACTERS
    assert "a…; tried again: b" in long
    assert both("a" * 300, "a" * 300).endswith("…, twice")
