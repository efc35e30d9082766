"""The command `moetune check`: its tables, its document and its exit codes."""

from __future__ import annotations

import importlib
import json
import re
from functools import partial

import pytest

from moetune.tuning import final_comparison as final

CHECK = importlib.import_module("moetune.tuning.check")
GOOD = {"default": 1.0, "fast": 0.5}


@pytest.fixture
def question(tiny, planted, monkeypatch):
    """The options of a question to the backend `planted`, which runs in this process."""
    monkeypatch.setattr(CHECK, "check", partial(CHECK.check, isolate=False))
    planted.milliseconds = GOOD
    return ("--model", tiny(), "--ep", "4", "--dp", "--ladder", "4,8", "--draws", "4", "--backend", "planted")


def test_a_good_profile_passes_by_question_and_by_path(moetune, question) -> None:
    tuned = json.loads(moetune("tune", *question, "--json").stdout)
    by_question = moetune("check", *question)
    assert by_question.exit_code == 0, by_question.stderr
    assert "all 2 choices hold within 2 %" in by_question.stdout
    assert "measured with the same versions" in by_question.stdout
    assert f"profile: {tuned['path']}" in by_question.stdout
    by_path = moetune("check", tuned["path"], "--rows", "8", "--json")
    document = json.loads(by_path.stdout)
    assert (by_path.exit_code, document["path"]) == (0, tuned["path"])
    assert [bucket["rows"] for bucket in document["buckets"]] == [8]
    assert document["within"] == 0.02


def test_a_beaten_profile_ends_with_4_and_names_what_beats_it(moetune, question, planted) -> None:
    moetune("tune", *question)
    planted.milliseconds = {**GOOD, "new": 0.25}
    result = moetune("check", *question)
    assert result.exit_code == 4
    assert "of 2 choices 0 hold within 2 %: 2 beaten" in result.stdout
    assert re.search(r"(?m)^4 rows: fast: slower than another tactic by [\d.]+ % at 4 rows: new$", result.stdout)
    assert "error: 2 of 2 choices do not hold. Tune again" in result.stderr
    assert moetune("check", *question, "--within", "150%").exit_code == 0
    assert json.loads(moetune("check", *question, "--json").stdout)["buckets"][0]["finding"] == "beaten"


def test_distributions_are_a_column_if_there_are_several(moetune, question) -> None:
    moetune("tune", *question)
    result = moetune("check", *question, "--under", "zipf:1")
    assert result.exit_code == 0, result.stderr
    assert "distribution" in result.stdout
    assert "zipf:1" in result.stdout
    assert "all 4 choices hold" in result.stdout


def test_what_is_not_stored_is_a_miss(moetune, question) -> None:
    assert moetune("check", *question).exit_code == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--within", "2"], "--within must be a percentage, given '2'"),
        (["--within", "-1%"], "--within must be a percentage"),
        (["--rows", "4,x"], "--rows must be row counts, given '4,x'"),
        (["--rows", "16"], "The profile has no bucket of 16 rows. It has 4, 8."),
        (["--under", "uneven"], "uneven"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(moetune, question, options, words) -> None:
    moetune("tune", *question)
    result = moetune("check", *question, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_noisy_machine_is_no_verdict(moetune, question, monkeypatch) -> None:
    moetune("tune", *question)
    monkeypatch.setattr(final, "noise_floor", lambda *pairs: 0.3)
    result = moetune("check", *question)
    assert result.exit_code == 1
    assert "too noisy to decide at 4, 8 rows" in result.stderr


def test_an_interrupt_says_nothing_of_saved_buckets(moetune, question, monkeypatch) -> None:
    moetune("tune", *question)

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(CHECK, "decide", interrupted)
    result = moetune("check", *question)
    assert result.exit_code == 130
    assert "saved" not in result.stderr
