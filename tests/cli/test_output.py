"""How a command writes to a terminal and to a pipe."""

import io
import sys

import pytest
from rich.table import Table

from moetune.cli import output
from moetune.cli.main import main


class Terminal(io.StringIO):
    def isatty(self):
        return True


def _streams(monkeypatch):
    """Makes stdout a pipe and stderr a terminal of 50 columns. Pytest sets both anew after the fixtures."""
    out, err = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("COLUMNS", "50")
    return out, err


def _table():
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column()
    table.add_row("rows", "a word " * 12)
    table.add_row("b", "c")
    return table


def test_no_line_in_a_pipe_ends_with_blanks(monkeypatch):
    streams = _streams(monkeypatch)
    monkeypatch.delenv("COLUMNS")
    output.show(_table())
    lines = streams[0].getvalue().splitlines()
    assert [line.split() for line in lines] == [["rows", *["a", "word"] * 12], ["b", "c"]]
    assert all(line == line.rstrip() for line in lines)


def test_a_pipe_has_the_columns_that_the_variable_gives(monkeypatch):
    streams = _streams(monkeypatch)
    output.show(_table())
    lines = streams[0].getvalue().splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 50 for line in lines)


def test_an_error_folds_between_words_in_a_terminal_and_not_in_a_pipe(monkeypatch):
    streams = _streams(monkeypatch)
    with pytest.raises(SystemExit):
        main.main(["show"])
    lines = streams[1].getvalue().splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 50 for line in lines)
    assert " ".join(line.strip() for line in lines) == (
        "error: `moetune show` takes either a profile's path, or --model with options, or --launch. Example: "
        "moetune show --launch 'vllm serve …'. `moetune store list` prints the paths."
    )
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with pytest.raises(SystemExit):
        main.main(["show"])
    assert pipe.getvalue().count("\n") == 1


def test_a_command_is_never_folded(monkeypatch):
    streams = _streams(monkeypatch)
    output.report("short", command="moetune show " + "x" * 60)
    assert streams[1].getvalue() == f"short\nmoetune show {'x' * 60}\n"


@pytest.mark.parametrize("words", [["models"], ["store", "list"]])
def test_a_terminal_says_where_the_column_is_that_it_leaves_out(monkeypatch, words):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("MOETUNE_PACKAGED_PROFILES", raising=False)
    with pytest.raises(SystemExit):
        main.main(words)
    assert f"`moetune {' '.join(words)} | cat` prints" in sys.stdout.getvalue()
