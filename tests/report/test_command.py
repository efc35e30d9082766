import os
import sys
from pathlib import Path

import pytest

from moetune.report.command import command, shortest


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a program `moetune` on PATH and another one into `.venv/bin` of the working folder."""
    for folder in ("path", ".venv/bin"):
        program = tmp_path / folder / "moetune"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        ("path/moetune", "moetune"),
        (".venv/bin/moetune", ".venv/bin/moetune"),
        ("some/pytest/__main__.py", "moetune"),
        ("benchmarks/picture.py", "moetune"),
        ("gone/moetune", "moetune"),
    ],
)
def test_a_command_starts_with_the_program_as_it_was_typed(installed, monkeypatch, started, typed):
    monkeypatch.setattr(sys, "argv", [started, "plan"])
    assert command("show", "a b.json") == f"{typed} show 'a b.json'"


def test_a_link_on_path_to_this_program_is_this_program(installed, monkeypatch):
    (installed / "path" / "moetune").unlink()
    os.symlink(installed / ".venv" / "bin" / "moetune", installed / "path" / "moetune")
    monkeypatch.setattr(sys, "argv", [".venv/bin/moetune", "plan"])
    assert command("models") == "moetune models"


def test_without_a_program_on_path_the_typed_one_is_named(installed, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [".venv/bin/moetune", "plan"])
    assert command("models") == ".venv/bin/moetune models"


def test_a_module_is_started_by_the_interpreter_as_it_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/moetune/__main__.py", "plan"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "moetune", "plan"])
    assert command("models") == ".venv/bin/python -m moetune models"


def test_a_path_below_the_working_folder_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shortest(tmp_path / "profiles" / "p.json") == str(Path("profiles", "p.json"))
    assert shortest("/elsewhere/p.json") == "/elsewhere/p.json"
